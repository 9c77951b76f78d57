"""From noise to latents by name: samplers that see a path and a denoiser, and nothing of what the network predicts.

Shapes: b samples, C latent channels, h x w latent pixels; any shape [b, ...] will do. On every path
x_t = alpha x0 + sigma eps, so what a network says of x0 says eps, too, and the probability-flow ODE reads
dx = x0 dalpha + eps dsigma (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 13, in these terms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import assert_never

import torch
from torch import Tensor

from pipeline.config import SamplingConfig
from pipeline.diffusion.grid import Level, levels
from pipeline.diffusion.objective import Denoiser
from pipeline.diffusion.ode import probability_flow
from pipeline.diffusion.path import Path

TOLERANCE = 1e-3
"""Of the adaptive solver, where the run file says nothing."""

Progress = Callable[[float], None]
"""Called with the share that is done, up to 1."""

Draw = Callable[[int], Tensor]
"""(step) -> standard normal numbers [b, ...]: 0 = what sampling begins with, n = what DDIM may add after step n."""


def sample(
    sampling: SamplingConfig, path: Path, denoiser: Denoiser, draw: Draw, progress: Progress | None = None
) -> Tensor:
    """Carry noise to data.

    Args:
        sampling: sampler, and its steps; what it says of guidance is for the denoiser.
        path: how data became noise.
        denoiser: guess of the data; asked at times in [path.t_min, path.t_max].
        draw: the noise.
        progress: called after each step.

    Returns:
        Data, as noise.

    Raises:
        ConfigError: a grid that the path cannot have.
        LatheError: the adaptive solver cannot keep to its tolerance.
    """
    x = draw(0) * path.prior_std
    if sampling.sampler == "ode":
        return probability_flow(path, denoiser, x, tolerance=sampling.tolerance or TOLERANCE, progress=progress)
    points = levels(path, sampling.grid, sampling.steps)
    match sampling.sampler:
        case "euler":
            return ddim(denoiser, x, points, progress=progress)
        case "ddim":
            return ddim(denoiser, x, points, eta=sampling.eta, draw=draw, progress=progress)
        case "heun":
            return heun(denoiser, x, points, progress=progress)
        case "dpm++":
            return dpm_solver_2m(denoiser, x, points, progress=progress)
    assert_never(sampling.sampler)


def ddim(
    denoiser: Denoiser,
    x: Tensor,
    points: Sequence[Level],
    *,
    eta: float = 0.0,
    draw: Draw | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM: Song et al. 2020 (https://arxiv.org/abs/2010.02502), eq. 12, with eta as in eq. 16, on any path.

    With eta 0 it is Euler's method, as used on each of the paths: along t on the straight one (Liu et al. 2022), along
    sigma where alpha is 1 (Karras et al. 2022, algorithm 1 without its correction), along sigma / alpha of x / alpha on
    the variance-preserving ones (as in diffusers' EulerDiscreteScheduler). Order 1.

    Args:
        denoiser: asked once a step.
        x: [b, ...] at `points[0]`.
        points: from noise to clean data.
        eta: share of the noise that is drawn anew, 0 to 1.
        draw: for eta > 0; not asked in the last step, which leads to clean data.
        progress: called after each step.

    Raises:
        ValueError: eta above 0, and nothing to draw from.
    """
    if eta and draw is None:
        raise ValueError(f"eta={eta:g} draws noise anew in every step, and there is no draw")
    for step, (here, there) in enumerate(pairwise(points), 1):
        x0 = denoiser(x, _times(x, here))
        anew = eta * there.sigma * math.sqrt(1 - (there.ratio / here.ratio) ** 2)
        x = _toward(x, x0, here, there, math.sqrt(there.sigma**2 - anew**2))
        if anew and draw:
            x = x + anew * draw(step)
        _tell(progress, step, points)
    return x


def heun(denoiser: Denoiser, x: Tensor, points: Sequence[Level], *, progress: Progress | None = None) -> Tensor:
    """Heun's method: the trapezoidal rule on dx = x0 dalpha + eps dsigma, the far end found by Euler's. Order 2.

    Where alpha is 1 this is Karras et al. 2022, algorithm 1, and on the straight path Heun's method along t. On
    variance-preserving paths it differs from diffusers' HeunDiscreteScheduler, which applies the rule to x / alpha
    along sigma / alpha: that cannot begin where alpha is 0, and has up to five times the error at equal steps.

    Args:
        denoiser: asked twice a step, once in the last, which leads to clean data by Euler's method.
        x: [b, ...] at `points[0]`.
        points: from noise to clean data.
        progress: called after each step.
    """
    for step, (here, there) in enumerate(pairwise(points), 1):
        x0 = denoiser(x, _times(x, here))
        eps = (x - here.alpha * x0) / here.sigma
        far = _toward(x, x0, here, there, there.sigma)
        if there.sigma:
            far_x0 = denoiser(far, _times(x, there))
            far_eps = (far - there.alpha * far_x0) / there.sigma
            far = x + (there.alpha - here.alpha) / 2 * (x0 + far_x0) + (there.sigma - here.sigma) / 2 * (eps + far_eps)
        x = far
        _tell(progress, step, points)
    return x


def dpm_solver_2m(
    denoiser: Denoiser, x: Tensor, points: Sequence[Level], *, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M): Lu et al. 2022 (https://arxiv.org/abs/2211.01095), algorithm 2. Order 2.

    The first step, with nothing behind it, and the last, to clean data, are of order 1; so is the second, where the
    first began at alpha = 0, infinitely far away in log-SNR.

    Args:
        denoiser: asked once a step.
        x: [b, ...] at `points[0]`.
        points: from noise to clean data.
        progress: called after each step.
    """
    before: tuple[Level, Tensor] | None = None
    for step, (here, there) in enumerate(pairwise(points), 1):
        x0 = denoiser(x, _times(x, here))
        ahead = x0
        if before and before[0].alpha and there.sigma:
            # h_i / h_{i-1}, with h the step in log(alpha / sigma)
            growth = math.log(here.ratio / there.ratio) / math.log(before[0].ratio / here.ratio)
            ahead = x0 + growth / 2 * (x0 - before[1])
        x = _toward(x, ahead, here, there, there.sigma)
        before = here, x0
        _tell(progress, step, points)
    return x


def _toward(x: Tensor, x0: Tensor, here: Level, there: Level, kept: float) -> Tensor:
    """alpha' x0 + kept eps, with eps = (x - alpha x0) / sigma of where x is."""
    return (kept / here.sigma) * x + (there.alpha - kept * here.alpha / here.sigma) * x0


def _times(x: Tensor, level: Level) -> Tensor:
    return torch.full((len(x),), level.t, dtype=x.dtype, device=x.device)


def _tell(progress: Progress | None, step: int, points: Sequence[Level]) -> None:
    if progress:
        progress(step / (len(points) - 1))
