"""Time grids: at which points of a path the samplers with fixed steps ask the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.diffusion.objective import SIGMA_MAX, SIGMA_MIN
from pipeline.diffusion.path import Path, RectifiedFlow, VariancePreserving
from pipeline.errors import ConfigError

Grid = Literal["uniform", "trailing", "karras", "log_snr"]

RHO = 7.0
"""Karras et al. 2022 (https://arxiv.org/abs/2206.00364), table 1."""


@dataclass(frozen=True)
class Level:
    """One point of a path, in float64.

    Args:
        t: the path's time.
        alpha: share of the data there.
        sigma: standard deviation of the noise there.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha; infinite where nothing of the data is left."""
        return self.sigma / self.alpha if self.alpha else math.inf


def levels(path: Path, grid: Grid | None, steps: int) -> list[Level]:
    """`steps` points at which the network is asked, from pure noise on, and clean data as the last one.

    Args:
        path: how data become noise.
        grid: how they are spread; None = as is usual for the path: uniform for rectified flow, trailing for variance
            preserving, Karras for variance exploding.
        steps: number of steps, 1 or more.

    Returns:
        steps + 1 levels of falling sigma / alpha: the first at `path.t_max`, the last with alpha 1 and sigma 0.

    Raises:
        ConfigError: a trailing grid where the path has no table of timesteps, or fewer of them than steps.
    """
    times = _TIMES[grid or usual_grid(path)](path, steps)
    times[0] = path.t_max
    points = zip(times.tolist(), path.alpha(times).tolist(), path.sigma(times).tolist(), strict=True)
    return [*(Level(*point) for point in points), Level(path.t_min, 1.0, 0.0)]


def usual_grid(path: Path) -> Grid:
    """The grid that the path's authors use."""
    if isinstance(path, RectifiedFlow):
        return "uniform"
    return "trailing" if isinstance(path, VariancePreserving) else "karras"


def ratio_range(path: Path) -> tuple[float, float]:
    """Lowest and highest sigma / alpha worth a step: the path's ends, EDM's where these are 0 or beyond them."""
    ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    low, high = (path.sigma(ends) / path.alpha(ends)).tolist()
    return low or SIGMA_MIN, min(high, SIGMA_MAX)


def _uniform(path: Path, steps: int) -> Tensor:
    """Even in t. Where the path's own end is clean, the last step leads to it; else `path.t_min` is asked, too."""
    clean = float(path.sigma(torch.tensor(path.t_min, dtype=torch.float64))) == 0.0
    return torch.linspace(path.t_max, path.t_min, steps + clean, dtype=torch.float64)[:steps]


def _trailing(path: Path, steps: int) -> Tensor:
    """Whole timesteps from the last of the table on: Lin et al. 2023 (https://arxiv.org/abs/2305.08891), table 2."""
    if not isinstance(path, VariancePreserving):
        raise ConfigError(
            "grid: trailing is for the table of timesteps of a variance-preserving objective, which this run has not",
            "leave grid out: the objective's usual one is taken",
        )
    table = path.t_max + 1
    if steps > table:
        raise ConfigError(
            f"steps: {steps}, and the objective's table has {table:g} timesteps to choose from",
            "take fewer steps, or grid=log_snr, which goes between them",
        )
    spread = table - torch.arange(steps, dtype=torch.float64) * (table / steps)
    return spread.round() - 1


def _karras(path: Path, steps: int) -> Tensor:
    """Even in (sigma / alpha) ** (1 / rho): Karras et al. 2022, eq. 5."""
    low, high = ratio_range(path)
    roots = torch.linspace(high ** (1 / RHO), low ** (1 / RHO), steps, dtype=torch.float64)
    return path.time_of(roots**RHO)


def _log_snr(path: Path, steps: int) -> Tensor:
    """Even in log(alpha / sigma): Lu et al. 2022 (https://arxiv.org/abs/2206.00927), section 3.4."""
    low, high = ratio_range(path)
    return path.time_of(torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp())


_TIMES: dict[Grid, Callable[[Path, int], Tensor]] = {
    "uniform": _uniform,
    "trailing": _trailing,
    "karras": _karras,
    "log_snr": _log_snr,
}
