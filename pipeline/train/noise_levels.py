"""Training losses by noise level, from the errors that steps have anyway: nothing is computed before they are told.

Legend: b samples of a step, K parts of the noise levels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.diffusion.objective import objective_of
from pipeline.train.draws import edges

_MOST_HELD = 256


class NoiseLevels:
    """The parts of a run's noise levels, those of its validation.

    Args:
        config: the run file.
        device: where noise levels are asked for.
    """

    def __init__(self, config: TrainConfig, device: torch.device | None = None) -> None:
        found = edges(objective_of(config.objective), config.validation.noise_levels)
        self._inner = found[1:-1].float().to(device)  # now: the host waits for it
        ends, digits = found.tolist(), len(str(config.validation.noise_levels - 1))
        self.names = [f"{part:0{digits}}_{low:.2f}-{high:.2f}" for part, (low, high) in enumerate(pairwise(ends))]
        """Number, to sort by, lower and upper end of each, as sigma / sqrt(alpha^2 + sigma^2)."""

    def part_of(self, levels: Tensor) -> Tensor:
        """Which part each noise level is in: int64 [b]; an edge belongs to the part above it."""
        return torch.bucketize(levels.contiguous(), self._inner, right=True)


class LevelLosses:
    """Squared errors since the last line of the log, by part of the noise levels.

    Args:
        levels: their parts, on the errors' device.
        device: where the errors are.
    """

    def __init__(self, levels: NoiseLevels, device: torch.device) -> None:
        self._levels = levels
        self._sums = torch.zeros(2, len(levels.names), dtype=torch.float64, device=device)
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, errors: Tensor, levels: Tensor, weight: Tensor) -> None:
        """A micro batch: squared errors [b], noise levels [b], and weights [b], 0 where a sample does not count."""
        self._held.append((errors.detach(), levels, weight))
        if len(self._held) == _MOST_HELD:
            self._fold()

    def sums(self) -> Tensor:
        """Sum of the finite errors of each part, and how many they are: float64 [2, K], on the device."""
        self._fold()
        return self._sums

    @torch.no_grad()
    def _fold(self) -> None:
        if not self._held:
            return
        errors, levels, weight = (torch.cat(tensors) for tensors in zip(*self._held, strict=True))
        self._held.clear()
        counts = errors.isfinite() & (weight > 0)
        terms = torch.stack([torch.where(counts, errors, 0.0), counts.to(errors)]).double()
        self._sums.index_add_(1, self._levels.part_of(levels), terms)
