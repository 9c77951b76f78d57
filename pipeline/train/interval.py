"""What is summed up between two lines of the log, without waiting for the device.

Legend: K parts of the noise levels, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.runtime.process import Process
from pipeline.train.noise_levels import LevelLosses, NoiseLevels
from pipeline.train.step_clock import Part, StepClock


class RankTimes(NamedTuple):
    """Of one rank's steps, in seconds."""

    wait: float
    forward: float
    forward_backward: float


class Totals(NamedTuple):
    """An interval over all ranks."""

    loss: float  # mean of the finite ones; NaN where there is none
    level_losses: dict[str, float]  # of the noise levels that occurred
    ranks: list[RankTimes]  # means of a step


class Interval:
    """Sums since the last line of the log. Those of the losses stay on the device.

    Args:
        device: that computes.
        levels: by which losses are told; None = neither these nor where the time goes.
        logging_seconds: that the last line took; they are this interval's.
    """

    def __init__(self, device: torch.device, levels: NoiseLevels | None, logging_seconds: float = 0.0) -> None:
        self.loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the finite losses, and their count
        self.steps = 0
        self.wait_seconds = self.ranks_wait_seconds = 0.0
        self.seconds = self.logging_seconds = logging_seconds
        self._clock = StepClock(device) if levels is not None else None
        self._names = levels.names if levels is not None else []
        self._levels = LevelLosses(levels, device) if levels is not None else None

    def begin(self) -> None:
        """A step begins to compute."""
        if self._clock is not None:
            self._clock.start()

    def mark(self, part: Part) -> None:
        """What was computed since the last mark was this part of the step."""
        if self._clock is not None:
            self._clock.mark(part)

    def hear(self, errors: Tensor, levels: Tensor, weight: Tensor) -> None:
        """A micro batch's squared errors, see `LevelLosses.add`."""
        if self._levels is not None:
            self._levels.add(errors, levels, weight)

    @contextmanager
    def waiting_for_ranks(self) -> Iterator[None]:
        """Meanwhile this rank waits for others."""
        started = time.perf_counter()
        yield
        self.ranks_wait_seconds += time.perf_counter() - started

    def add(self, loss: Tensor, wait_seconds: float, ranks_wait_seconds: float, seconds: float) -> None:
        """One step's loss on this rank, and its times: for data, for other ranks besides, and in all."""
        finite = torch.isfinite(loss)
        self.loss += torch.stack([torch.where(finite, loss, 0.0), finite])
        self.steps += 1
        self.wait_seconds += wait_seconds
        self.ranks_wait_seconds += ranks_wait_seconds
        self.seconds += seconds

    def parts(self) -> dict[Part, float]:
        """Seconds of this rank's steps by what they computed, means of a step; waits for the device."""
        if self._clock is None:
            return {}
        return {part: seconds / self.steps for part, seconds in self._clock.seconds().items()}

    def reduced(self, ranks: Process, parts: dict[Part, float]) -> Totals:
        """Over all ranks, in one collective.

        Args:
            ranks: all call it.
            parts: of this rank.
        """
        sums = [self.loss] if self._levels is None else [self.loss, self._levels.sums().flatten()]
        rows = torch.zeros(ranks.world_size, len(RankTimes._fields), dtype=torch.float64)
        forward, backward = parts.get("forward", 0.0), parts.get("backward", 0.0)
        rows[ranks.rank] = torch.tensor([self.wait_seconds / self.steps, forward, forward + backward])
        reduced = ranks.sum(torch.cat([torch.cat(sums).cpu(), rows.flatten()]))
        loss, levels, times = reduced[:2], reduced[2 : -rows.numel()], reduced[-rows.numel() :]
        total, count = loss.tolist()
        by_level = zip(self._names, *levels.reshape(2, -1).tolist(), strict=True)
        return Totals(
            loss=total / count if count else float("nan"),
            level_losses={name: error / number for name, error, number in by_level if number},
            ranks=[RankTimes(*row) for row in times.reshape(rows.shape).tolist()],
        )
