"""Ranks that a launcher has started tell rank 0 something, although they may not be able to talk otherwise.

What is told goes through the launcher's key-value store, one connection from each rank to the first machine. The
collective is a trial of what training needs beside: connections of all ranks with each other.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from pipeline.errors import SetupError
from pipeline.runtime import environment

_LOOK_SECONDS = 0.05
_LEAVE_SECONDS = 5.0
_MOST_RANKS = 1 << 20
_WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
REMEDY = (  # of a collective that fails, or is never done
    "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that leads to the other machines, and let firewalls"
    " pass all ports between them"
)


class RollCall:
    """This rank's line to the others.

    Args:
        seconds: to reach the first machine.

    Raises:
        SetupError: no launcher has said who is who, or the first machine cannot be reached.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        if missing := [name for name in _WANTED if not os.environ.get(name)]:
            raise SetupError(
                f"--all-ranks: {', '.join(missing)} not set: no launcher has started this",
                "start it as training is: torchrun --nproc-per-node 2 -m pipeline doctor CONFIG --all-ranks",
            )
        self.world_size = _number("WORLD_SIZE", _MOST_RANKS)
        self.rank = _number("RANK", self.world_size)
        host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 65536)
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                host,
                port,
                is_master=self.rank == 0 and not of_agent,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (RuntimeError, OSError) as error:
            raise SetupError(
                f"rank {self.rank} cannot reach {host}:{port} (MASTER_ADDR, MASTER_PORT): {_first_line(error)}",
                "set MASTER_ADDR to an address of the first machine that all others reach, and a free MASTER_PORT",
            ) from error
        self._store = PrefixStore("lathe-roll-call", store)
        self.backends = ("gloo", "nccl") if torch.cuda.is_available() else ("gloo",)
        """By which training talks."""

    def collective(self, seconds: float) -> str:
        """Add up a number over all ranks, by each backend that training uses; what was done, in words.

        Args:
            seconds: for each backend.

        Raises:
            SetupError: it fails, or is not done in time; or no interface leads to the first machine.
        """
        environment.prepare()
        began = time.monotonic()
        for name in self.backends:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if name == "nccl" else None
            try:
                total = self._sum(name, device, timedelta(seconds=seconds))
            except (RuntimeError, OSError) as error:
                raise SetupError(
                    f"no collective of {self.world_size} ranks by {name}: {_first_line(error)}", REMEDY
                ) from error
            if total != self.world_size * (self.world_size + 1) // 2:
                raise SetupError(f"a sum over {self.world_size} ranks by {name} is wrong: {total:g}", REMEDY)
        taken = time.monotonic() - began
        return f"{self.world_size} ranks by {' and '.join(self.backends)}, in {max(0.1, taken):.1f} s"

    def _sum(self, backend: str, device: torch.device | None, timeout: timedelta) -> float:
        own = PrefixStore(backend, self._store)
        dist.init_process_group(
            backend, store=own, rank=self.rank, world_size=self.world_size, timeout=timeout, device_id=device
        )
        try:
            number = torch.tensor(float(self.rank + 1), device=device)
            dist.all_reduce(number)
            return float(number)
        finally:
            dist.destroy_process_group()

    def tell(self, text: str) -> None:
        """What rank 0 is to hear of this rank."""
        self._store.set(f"told/{self.rank}", text)

    def hear(self, seconds: float) -> dict[int, str]:
        """On rank 0: what each rank has told, of those that do so in time."""
        told: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        while len(told) < self.world_size:
            for rank in sorted(set(range(self.world_size)) - set(told)):
                if self._store.check([f"told/{rank}"]):
                    told[rank] = self._store.get(f"told/{rank}").decode()
            if len(told) < self.world_size:
                if time.monotonic() > deadline:
                    break
                time.sleep(_LOOK_SECONDS)
        return told

    def dismiss(self, text: str) -> None:
        """On rank 0: the others may leave, with a last word. Waited for, since the store may live in this process."""
        self._store.set("dismissed", text)
        deadline = time.monotonic() + _LEAVE_SECONDS
        others = [f"left/{rank}" for rank in range(1, self.world_size)]
        with suppress(RuntimeError):
            while not all(self._store.check([key]) for key in others) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)

    def wait(self, seconds: float) -> str:
        """On other ranks: rank 0's last word; a launcher ends all ranks as soon as one has left with an error.

        Raises:
            SetupError: rank 0 is gone.
        """
        try:
            self._store.wait(["dismissed"], timedelta(seconds=seconds))
            said = self._store.get("dismissed").decode()
            self._store.set(f"left/{self.rank}", "")
        except (RuntimeError, OSError) as error:
            raise SetupError(f"rank 0 is gone: {_first_line(error)}", "its own words say why") from error
        return said


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _number(name: str, end: int) -> int:
    """A launcher's number below `end`. Raises SetupError."""
    said = os.environ[name]
    if not said.isdecimal() or len(said) > len(str(end)) or int(said) >= end:
        raise SetupError(f"--all-ranks: {name}={said} is no number from 0 to {end - 1}", "let a launcher set it")
    return int(said)
