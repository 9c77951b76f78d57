"""Euler's method on every path for data whose denoiser is known, and guidance by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Denoiser, objective_of
from pipeline.diffusion.path import Path, RectifiedFlow, VariancePreserving
from pipeline.diffusion.prediction import target
from pipeline.diffusion.sampler import euler, guided
from pipeline.randomness import Purpose, normal

MEAN, STD = 1.5, 0.4
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


def gaussian_denoiser(path: Path) -> Denoiser:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD**2): exact, by conditioning of joint Gaussians."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (path.alpha, path.sigma))
        return MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)

    return denoise


def noise() -> Tensor:
    return normal(3, Purpose.INITIAL_NOISE, 0, torch.arange(500), (2, 4, 4)).double()


@pytest.mark.parametrize("config", OBJECTIVES, ids=lambda config: " ".join(map(str, config.values())) or "flow")
def test_a_network_that_learned_its_target_is_sampled_rightly(config: dict) -> None:
    """What the network says is the objective's own target for the best guess of data and noise."""
    objective = objective_of(ObjectiveConfig(**config))
    path, exact = objective.path, gaussian_denoiser(objective.path)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(given: Tensor, embedding: Tensor) -> Tensor:
        x, t = seen[-1]
        alpha, sigma = path.alpha(t), path.sigma(t)
        assert torch.equal(embedding, path.embedding_input(t))
        assert 0.3 < given.std() < 3
        x0 = exact(x, t)
        eps = (x - alpha[:, None, None, None] * x0) / sigma[:, None, None, None]
        return target(objective.prediction, x0, eps, alpha, sigma, objective.sigma_data)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return objective.denoiser(network)(x, t)

    x = euler(denoise, path, noise(), 200)
    # in one dimension the flow keeps quantiles of t_max, which for epsilon is not pure noise: there a mean is left
    end = torch.tensor(path.t_max, dtype=torch.float64)
    alpha, sigma = path.alpha(end), path.sigma(end)
    quantile = (path.prior_std * noise() - alpha * MEAN) / ((alpha * STD).square() + sigma.square()).sqrt()
    assert (x - (MEAN + STD * quantile)).abs().max() < 0.06
    assert abs(x.std() - STD) < 0.02


def test_the_error_falls_with_the_first_power_of_the_step() -> None:
    path = RectifiedFlow()
    exact, denoise = MEAN + STD * noise(), gaussian_denoiser(path)
    errors = [(euler(denoise, path, noise(), n) - exact).abs().mean() for n in (50, 100, 200)]
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


@pytest.mark.parametrize("steps", [1, 7])
def test_a_single_target_is_reached_in_any_number_of_steps(steps: int) -> None:
    data = torch.full((500, 2, 4, 4), 0.7, dtype=torch.float64)
    for path in (RectifiedFlow(), VariancePreserving.linear()):
        assert torch.allclose(euler(lambda x, t: data, path, noise(), steps), data)


def test_times_run_evenly_from_pure_noise() -> None:
    seen: list[float] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    euler(record, RectifiedFlow(), torch.zeros(1, 1, 1, 1), 4)
    euler(record, VariancePreserving.linear(), torch.zeros(1, 1, 1, 1), 4)
    assert seen == [1.0, 0.75, 0.5, 0.25, 999, 749, 499, 249]


def test_guidance_extrapolates_from_the_empty_prompt() -> None:
    def network(x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        return x * 0 + time.reshape(-1, 1, 1, 1) + tokens.float().mean(1).reshape(-1, 1, 1, 1)

    x, time = torch.zeros(2, 1, 2, 2), torch.tensor([500.0, 250.0])
    tokens, empty = torch.tensor([[2, 2], [4, 4]]), torch.tensor([1, 1])
    plain = guided(network, tokens, empty, 1.0)(x, time)
    strong = guided(network, tokens, empty, 3.0)(x, time)
    assert plain[:, 0, 0, 0].tolist() == [502.0, 254.0]
    assert strong[:, 0, 0, 0].tolist() == [501.0 + 3 * 1, 251.0 + 3 * 3]


def test_without_guidance_the_network_sees_each_sample_once() -> None:
    sizes: list[int] = []

    def network(x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    x, tokens, empty = torch.zeros(3, 1, 2, 2), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    guided(network, tokens, empty, 1.0)(x, torch.ones(3))
    guided(network, tokens, empty, 2.0)(x, torch.ones(3))
    assert sizes == [3, 6]
