"""Samplers on a mixture of Gaussians whose denoiser is known, beside each other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussian_mixture import Mixture
from torch import Tensor

from pipeline.config import ObjectiveConfig, SamplingConfig
from pipeline.diffusion.grid import levels
from pipeline.diffusion.objective import objective_of
from pipeline.diffusion.path import Path, RectifiedFlow, VarianceExploding, VariancePreserving
from pipeline.diffusion.prediction import target
from pipeline.diffusion.sampler import ddim, sample

MIXTURE = Mixture([0.3, 0.5, 0.2], [[-1.2, 0.4], [0.3, -0.8], [1.0, 1.1]], [0.2, 0.5, 0.1])
SCALED_LINEAR = VariancePreserving.scaled_linear()
PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(),
    "linear": VariancePreserving.linear(),
    "scaled_linear": SCALED_LINEAR,
    "cosine": VariancePreserving.cosine(),
    "zero_terminal": SCALED_LINEAR.rescaled_to_zero_terminal_snr(),
    "exploding": VarianceExploding(),
}

OBJECTIVES = [
    {},
    {"prediction": "x0"},
    {"kind": "ddpm"},
    {"kind": "ddpm", "schedule": "cosine"},
    {"kind": "ddpm", "prediction": "v", "schedule": "linear"},
    {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True},
    {"kind": "ddpm", "prediction": "x0", "schedule": "cosine", "zero_terminal_snr": True},
    {"kind": "edm"},
]


def noise(count: int = 300) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(path: Path, x: Tensor | None = None, **settings: Any) -> Tensor:
    x = noise() if x is None else x
    return sample(SamplingConfig(**settings), path, MIXTURE.denoiser(path), lambda _: x)


@pytest.mark.parametrize("name", PATHS)
def test_errors_fall_with_the_sampler_s_order_towards_the_adaptive_solution(name: str) -> None:
    path = PATHS[name]
    exact = run(path, sampler="ode", tolerance=1e-9)
    for sampler, order in (("euler", 1), ("ddim", 1), ("heun", 2), ("dpm++", 2)):
        made = [run(path, sampler=sampler, steps=steps, grid="log_snr") for steps in (60, 120, 240)]
        errors = [float((x - exact).abs().mean()) for x in made]
        assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.2), sampler
        assert errors[2] < (1e-2 if order == 1 else 2e-4), sampler


@pytest.mark.parametrize("name", PATHS)
def test_a_single_target_is_reached_in_one_step(name: str) -> None:
    path, target = PATHS[name], torch.full((300, 2), 0.7, dtype=torch.float64)
    for sampler, steps in (("euler", 1), ("heun", 1), ("dpm++", 1), ("dpm++", 7), ("heun", 7), ("ode", 1)):
        sampling = SamplingConfig(sampler=sampler, steps=steps)
        made = sample(sampling, path, lambda x, t: target.to(x), lambda _: noise().float())
        assert torch.allclose(made.double(), target, atol=1e-4), sampler


def test_straight_path_keeps_the_numbers_of_euler_along_the_velocity() -> None:
    path, x = RectifiedFlow(), noise()
    denoise = MIXTURE.denoiser(path)
    times = torch.linspace(1.0, 0.0, 26, dtype=torch.float64).tolist()
    old = x
    for t, following in pairwise(times):
        old = old + (following - t) * (old - denoise(old, torch.full((300,), t, dtype=x.dtype))) / t
    torch.testing.assert_close(run(path, x, sampler="euler", steps=25), old, atol=1e-12, rtol=0)


def test_times_run_evenly_from_noise_and_progress_is_told() -> None:
    seen: list[float] = []
    told: list[float] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return x

    for sampler in ("euler", "heun"):
        sample(
            SamplingConfig(sampler=sampler, steps=4), RectifiedFlow(), record, lambda _: torch.zeros(1, 2), told.append
        )
    assert seen == [1.0, 0.75, 0.5, 0.25, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert told == [0.25, 0.5, 0.75, 1.0] * 2


@pytest.mark.parametrize("name", PATHS)
def test_ddim_that_draws_all_noise_anew_keeps_the_distribution(name: str) -> None:
    path, generator = PATHS[name], torch.Generator().manual_seed(1)
    sampling, first = SamplingConfig(sampler="ddim", eta=1.0, steps=200, grid="log_snr"), noise(4000)

    def draw(step: int) -> Tensor:
        return torch.randn(first.shape, dtype=torch.float64, generator=generator) if step else first

    made = sample(sampling, path, MIXTURE.denoiser(path), draw)
    truth = MIXTURE.draw(100_000, torch.Generator().manual_seed(2))
    assert (made.mean(0) - truth.mean(0)).abs().max() < 0.05
    assert (made.T.cov() - truth.T.cov()).abs().max() < 0.05
    assert not torch.allclose(made, run(path, first, sampler="ddim", steps=50, grid="log_snr"), atol=0.1)


def test_ddim_that_draws_noise_wants_something_to_draw_from() -> None:
    points = levels(PATHS["flow"], None, 4)
    with pytest.raises(ValueError, match=r"eta=0\.5 draws noise anew"):
        ddim(MIXTURE.denoiser(PATHS["flow"]), noise(), points, eta=0.5)
    assert ddim(MIXTURE.denoiser(PATHS["flow"]), noise(), points).isfinite().all()


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: " ".join(map(str, config.values())) or "flow")
def test_a_network_that_learned_its_target_is_sampled_rightly(config: dict) -> None:
    """What the network says is the objective's own target for the best guess of data and noise."""
    objective = objective_of(ObjectiveConfig(**config))
    path, gaussian = objective.path, Mixture([1.0], [[1.5, 1.5]], [0.4])
    exact = gaussian.denoiser(path)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(given: Tensor, embedding: Tensor) -> Tensor:
        x, t = seen[-1]
        alpha, sigma = path.alpha(t), path.sigma(t)
        assert torch.equal(embedding, path.embedding_input(t))
        assert 0.3 < given.std() < 3
        x0 = exact(x, t)
        eps = (x - alpha[:, None] * x0) / sigma[:, None]
        return target(objective.prediction, x0, eps, alpha, sigma, objective.sigma_data)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return objective.denoiser(network)(x, t)

    x = sample(SamplingConfig(sampler="euler", steps=200), path, denoise, lambda _: noise())
    # in one dimension the flow keeps quantiles of t_max, which for epsilon is not pure noise: there a mean is left
    end = torch.tensor(path.t_max, dtype=torch.float64)
    alpha, sigma = path.alpha(end), path.sigma(end)
    quantile = (path.prior_std * noise() - alpha * 1.5) / ((alpha * 0.4).square() + sigma.square()).sqrt()
    assert (x - (1.5 + 0.4 * quantile)).abs().max() < 0.06
    assert abs(x.std() - 0.4) < 0.02
