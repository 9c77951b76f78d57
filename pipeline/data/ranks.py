"""Which of how many processes this is, in a training script that is not ours."""

from __future__ import annotations

import os

from torch import distributed

from pipeline.errors import ConfigError, SetupError


def given_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and world size as they were given; None where they were not.

    Raises:
        ConfigError: only one was, or there is no such rank.
    """
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ConfigError(
            f"rank={rank} and world_size={world_size} name no process",
            "give both, the rank from 0 to world_size - 1, or neither",
        )
    return rank, world_size


def found_ranks() -> tuple[int, int]:
    """Rank and world size as torch.distributed knows them, or else the launcher's variables; else 0 of 1.

    Raises:
        ConfigError: RANK and WORLD_SIZE name no process.
    """
    if (known := _distributed()) is not None:
        return known
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={world_size} name no process", "give rank and world_size")
    return int(rank), int(world_size)


def check_ranks(rank: int, world_size: int) -> None:
    """Raises SetupError where torch.distributed, set up since, knows another rank or world size."""
    if (known := _distributed() or (rank, world_size)) != (rank, world_size):
        raise SetupError(
            f"the dataset took this process for rank {rank} of {world_size}, and it is rank {known[0]} of {known[1]}",
            "make the dataset after torch.distributed is set up, or give it rank and world_size",
        )


def _distributed() -> tuple[int, int] | None:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return None
