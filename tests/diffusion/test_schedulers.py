"""Samplers beside diffusers' schedulers: the same steps to the last digits, on data whose denoiser is known.

Schedulers for variance-preserving models see y = x / alpha and know a noise level by its ratio sigma / alpha.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from gaussian_mixture import Mixture
from torch import Tensor

from pipeline.config import SamplingConfig
from pipeline.diffusion.grid import Level, levels
from pipeline.diffusion.path import RectifiedFlow, VarianceExploding, VariancePreserving
from pipeline.diffusion.sampler import ddim, dpm_solver_2m, heun, sample

MIXTURE = Mixture([0.3, 0.5, 0.2], [[-1.2, 0.4], [0.3, -0.8], [1.0, 1.1]], [0.2, 0.5, 0.1])
SCALED_LINEAR = VariancePreserving.scaled_linear()


def noise() -> Tensor:
    return torch.randn(300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def data_in(x: Tensor, alpha: float, sigma: float) -> Tensor:
    if not alpha:
        return (MIXTURE.weights @ MIXTURE.means).expand_as(x)
    return MIXTURE.denoiser(VarianceExploding())(x / alpha, torch.full((len(x),), sigma / alpha, dtype=x.dtype))


def points_of(ratios: Tensor, *, straight: bool = False) -> list[Level]:
    """A scheduler's sigmas as levels; without `straight`, of sigma / alpha where variance is preserved."""
    if straight:
        return [Level(s, 1 - s, s) for s in ratios.tolist()]
    return [Level(s, (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5) for s in ratios.tolist()]


def denoiser_at(points: list[Level]) -> Any:
    by_time = {point.t: point for point in points}
    return lambda x, t: data_in(x, by_time[float(t[0])].alpha, by_time[float(t[0])].sigma)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_ddim_is_diffusers(eta: float, zero_terminal: bool) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_terminal,
    )
    scheduler.set_timesteps(20)
    fresh = [noise() + step for step in range(21)]
    x = noise()
    for step, t in enumerate(scheduler.timesteps, 1):
        alpha = float(scheduler.alphas_cumprod[t].double().sqrt())
        sigma = (1 - alpha**2) ** 0.5
        x0 = data_in(x, alpha, sigma)
        v = (alpha * x - x0) / sigma  # alpha eps - sigma x0
        x = scheduler.step(v, t, x, eta=eta, variance_noise=fresh[step] if eta else None).prev_sample
    path = SCALED_LINEAR.rescaled_to_zero_terminal_snr() if zero_terminal else SCALED_LINEAR
    ours = sample(
        SamplingConfig(sampler="ddim", eta=eta, steps=20),
        path,
        MIXTURE.denoiser(path),
        lambda step: fresh[step],
    )
    torch.testing.assert_close(ours, x, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("karras", [False, True])
def test_euler_is_diffusers(karras: bool) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="linspace",
        use_karras_sigmas=karras,
    )
    scheduler.set_timesteps(28)  # 999 / 27 is whole, so that uniform times are rows of the table
    y = noise() * float(scheduler.sigmas[0])
    points = levels(SCALED_LINEAR, "karras" if karras else "uniform", 28)
    torch.testing.assert_close(
        torch.tensor([p.ratio for p in points]), scheduler.sigmas, rtol=1e-4 if karras else 1e-5, atol=1e-6
    )
    points = points_of(scheduler.sigmas.double())
    x = y * points[0].alpha
    for step, t in enumerate(scheduler.timesteps):
        ratio = float(scheduler.sigmas[step])
        scheduler.scale_model_input(y, t)
        y = scheduler.step((y - data_in(y, 1, ratio)) / ratio, t, y).prev_sample
    torch.testing.assert_close(ddim(denoiser_at(points), x, points), y.double(), atol=3e-5, rtol=1e-4)


def test_heun_is_diffusers() -> None:
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    ratios = [float(scheduler.sigmas[0]), *scheduler.sigmas[1::2].tolist()]
    path = VarianceExploding(ratios[-2], ratios[0])
    y = noise() * ratios[0]
    for t in scheduler.timesteps:
        scheduler.scale_model_input(y, t)
        ratio = float(scheduler.sigmas[scheduler.step_index])
        y = scheduler.step((y - data_in(y, 1, ratio)) / ratio, t, y).prev_sample
    ours = heun(MIXTURE.denoiser(path), noise() * ratios[0], levels(path, "karras", 12))
    torch.testing.assert_close(ours, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver_is_diffusers(straight: bool, steps: int) -> None:
    kind = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if straight else {"use_karras_sigmas": True}
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", **kind)
    scheduler.set_timesteps(steps)
    points = points_of(scheduler.sigmas.double(), straight=straight)
    x = noise()
    for t, here in zip(scheduler.timesteps, points, strict=False):
        x0 = data_in(x, here.alpha, here.sigma)
        eps = (x - here.alpha * x0) / here.sigma
        x = scheduler.step(eps - x0 if straight else eps, t, x).prev_sample
    ours = dpm_solver_2m(denoiser_at(points), noise(), points)
    torch.testing.assert_close(ours, x.double(), atol=2e-5, rtol=2e-5)


def test_straight_path_is_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.05, 20).numpy())
    x = noise()
    for step, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[step])
        x = scheduler.step((x - data_in(x, 1 - sigma, sigma)) / sigma, t, x).prev_sample.double()
    path = RectifiedFlow()
    ours = sample(SamplingConfig(sampler="euler", steps=20), path, MIXTURE.denoiser(path), lambda _: noise())
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
