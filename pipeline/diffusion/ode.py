"""The probability-flow ODE by an adaptive solver: Dormand-Prince 5(4), each sample with steps of its own.

So a picture does not depend on which others are made with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.grid import ratio_range
from pipeline.diffusion.objective import Denoiser
from pipeline.diffusion.path import Path
from pipeline.diffusion.prediction import over
from pipeline.errors import LatheError

Field = Callable[[Tensor, Tensor], Tensor]
"""(u float64 [b], y [b, ...]) -> dy/du, as y."""

MOST_STEPS = 1000
SMALLEST_STEP = 1e-9
"""Of the whole way; what asks for less is not a number."""

# Dormand & Prince 1980 (https://doi.org/10.1016/0771-050X(80)90013-3), table 2: nodes, stages, and the difference of
# the solutions of order 5 and 4. The last stage is the solution itself, and the first stage of the next step.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def probability_flow(
    path: Path,
    denoiser: Denoiser,
    x: Tensor,
    *,
    tolerance: float,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Solve dx = x0 dalpha + eps dsigma from `path.t_max` on, and take the denoiser's word at the end.

    With y = x / sqrt(alpha**2 + sigma**2) and the angle u = arctan(sigma / alpha), the ODE of every path reads
    dy/du = cos(u) eps - sin(u) x0 = (cos(u) y - x0) / sin(u) (v of Salimans & Ho 2022,
    https://arxiv.org/abs/2202.00512, appendix D), which is finite at pure noise, too.

    Args:
        path: how data became noise.
        denoiser: (x, t [b]) -> x0.
        x: [b, ...] at `path.t_max`.
        tolerance: error allowed in each step, relative and absolute.
        progress: called after each step with the share of the angle that the slowest sample has behind it.

    Returns:
        Data, as x.

    Raises:
        LatheError: the tolerance cannot be kept, as where the network's output is not finite.
    """

    def at(u: Tensor, y: Tensor) -> Tensor:
        t = path.time_of(u.tan()).clamp(path.t_min, path.t_max)
        scale = torch.hypot(path.alpha(t), path.sigma(t))
        return denoiser(_along(scale, y) * y, t.to(y.dtype))

    def field(u: Tensor, y: Tensor) -> Tensor:
        return (_along(u.cos(), y) * y - at(u, y)) / _along(u.sin(), y)

    first = torch.tensor(path.t_max, dtype=torch.float64)
    alpha, sigma = float(path.alpha(first)), float(path.sigma(first))
    end = math.atan(ratio_range(path)[0])
    y = dormand_prince(
        field, x / math.hypot(alpha, sigma), math.atan2(sigma, alpha), end, tolerance=tolerance, progress=progress
    )
    return at(torch.full((len(x),), end, dtype=torch.float64, device=x.device), y)


def dormand_prince(
    field: Field,
    y: Tensor,
    start: float,
    end: float,
    *,
    tolerance: float,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Integrate dy/du = field(u, y) from start to end; the step is chosen for each sample by its own error.

    Hairer, Norsett & Wanner 1993, "Solving ordinary differential equations I", section II.4: error in eq. 4.11, step
    size in eq. 4.13. Samples that are done wait for the others.

    Args:
        field: asked six times a step, and once before.
        y: [b, ...] at start.
        start: first u.
        end: last u, on either side of start.
        tolerance: for each sample, the root mean square of error / (1 + |y|) stays below it in each step.
        progress: called after each step with the slowest sample's share.

    Raises:
        LatheError: more than `MOST_STEPS` steps, or a step below `SMALLEST_STEP` of the way.
    """
    u = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    step = torch.full_like(u, (end - start) / 100)
    slope = field(u, y)
    for _ in range(MOST_STEPS):
        left = end - u
        step = torch.where(step.abs() < left.abs(), step, left)
        after, slope_after, difference = _step(field, u, y, slope, step)
        error = _root_mean_square(difference / (1 + torch.maximum(y.abs(), after.abs()))) / tolerance
        taken = error <= 1  # a NaN is not
        y = torch.where(over(taken, y), after, y)
        slope = torch.where(over(taken, y), slope_after, slope)
        u = torch.where(taken, u + step, u)
        u = torch.where(taken & (step == left), end, u)
        if progress:
            progress(float(((u - start) / (end - start)).min()))
        if bool((u == end).all()):
            return y
        step = step * (0.9 * error.nan_to_num(math.inf, math.inf) ** -0.2).clamp(0.2, 5.0)
        if bool(((u != end) & (step.abs() < SMALLEST_STEP * abs(end - start))).any()):
            break
    raise LatheError(
        f"sampler=ode cannot keep to tolerance={tolerance:g}: its steps became too many or too small",
        "give a larger tolerance, or sampler=dpm++; if that fails as well, the network's output is not finite",
    )


def _step(field: Field, u: Tensor, y: Tensor, slope: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One trial step: y after it, the slope there, and the estimated error."""
    slopes, width, trial = [slope], _along(step, y), y
    for node, weights in zip(_NODES, _STAGES, strict=True):
        trial = y + width * _combine(weights, slopes)
        slopes.append(field(u + node * step, trial))
    return trial, slopes[-1], width * _combine(_ERROR, slopes)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return torch.stack([weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]).sum(0)


def _root_mean_square(values: Tensor) -> Tensor:
    """[b, ...] -> float64 [b]."""
    return values.double().square().flatten(1).mean(1).sqrt()


def _along(values: Tensor, y: Tensor) -> Tensor:
    return over(values.to(y.dtype), y)
