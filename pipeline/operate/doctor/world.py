"""How many ranks the run is to have, and which of them this process is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError

_CPU_RANKS = 2  # the launchers' default without GPUs


@dataclass(frozen=True)
class World:
    """The ranks of the run that is asked about.

    Attributes:
        ranks: on all machines.
        local_ranks: on this machine.
        rank: of this process; None = no launcher has started it.
        local_rank: on this machine.
    """

    ranks: int
    local_ranks: int
    rank: int | None = None
    local_rank: int = 0

    @property
    def is_first_here(self) -> bool:
        """Whether this process looks at what is the same for all of a machine."""
        return self.local_rank == 0


def find_world(environment: Mapping[str, str], *, gpus: int, asked: int | None, configured: int | None) -> World:
    """As a launcher says, else as the launchers' variables (NODES, NPROC), the run file or the GPUs do.

    Args:
        environment: of this process.
        gpus: that torch sees here.
        asked: ranks, by the command line.
        configured: engine.world_size.

    Raises:
        ConfigError: a variable is no number of ranks.
    """
    if "RANK" in environment:
        ranks = _number(environment, "WORLD_SIZE", 1)
        local = _number(environment, "LOCAL_WORLD_SIZE", ranks)
        return World(ranks, local, _number(environment, "RANK", 0, 0), _number(environment, "LOCAL_RANK", 0, 0))
    nodes, local = _number(environment, "NODES", 1), _number(environment, "NPROC", 0)
    wanted = asked if asked is not None or local else configured
    if wanted is None:
        local = local or gpus or _CPU_RANKS
        return World(nodes * local, local)
    if not local:  # as many as the launchers start here, of so many on each of NODES
        local = min(-(-wanted // nodes), gpus or (_CPU_RANKS if nodes == 1 else wanted))
    return World(wanted, min(wanted, local))


def _number(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    said = environment.get(name, "")
    if not said:
        return default
    if not said.isdecimal() or int(said) < least:
        raise ConfigError(f"{name}={said} is no number from {least} on", f"set {name} to a number, or unset it")
    return int(said)
