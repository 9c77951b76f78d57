"""Which process of which run this is, as Prometheus is told."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path

from pipeline.metrics.numbers import clean
from pipeline.metrics.table import Job


@dataclass(frozen=True)
class Place:
    """One process among those of its run.

    Args:
        output: of the run: its address, or folder.
        number: its rank, or the index of an encode worker.
        count: ranks or workers in all.
        local: its rank among the processes of this machine.
    """

    output: str = ""
    number: int = 0
    count: int = 1
    local: int = 0

    def labels(self, job: Job, run: str | None = None) -> dict[str, str]:
        """Of the process as a target: `lathe_job`, `run`, `rank` or `worker`, `host`.

        Args:
            job: what it does.
            run: the run's name; None = the last part of its output.
        """
        number = {"worker" if job == "encode" else "rank": str(self.number)}
        return {"lathe_job": job, "run": clean(run or self._name), **number, "host": clean(socket.gethostname())}

    @property
    def owner(self) -> str:
        """The run's output in full, which no other run has."""
        return self.output if "://" in self.output else str(Path(self.output).absolute())

    @property
    def digest(self) -> str:
        """Of `owner`: eight letters that tell it from others."""
        return hashlib.sha256(self.owner.encode(errors="surrogateescape")).hexdigest()[:8]

    @property
    def _name(self) -> str:
        return self.owner.rstrip("/").rpartition("/")[2] or "run"
