"""Euler's method on a field whose solution is known, and guidance by hand."""

import torch

from pipeline.diffusion.sampler import Velocity, euler, guided
from pipeline.randomness import Purpose, normal

MEAN, STD = 1.5, 0.4


def gaussian_field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | x_t] for x0 ~ N(MEAN, STD**2): exact, by conditioning of joint Gaussians."""
    t = t.reshape(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def noise() -> torch.Tensor:
    return normal(3, Purpose.INITIAL_NOISE, 0, torch.arange(500), (2, 4, 4)).double()


def test_euler_carries_noise_to_the_target_distribution() -> None:
    x = euler(gaussian_field, noise(), 400)
    assert abs(x.mean() - MEAN) < 0.015
    assert abs(x.std() - STD) < 0.015
    # in one dimension the flow keeps quantiles: each number lands where the inverse CDF sends it
    assert (x - (MEAN + STD * noise())).abs().max() < 0.03


def test_the_error_falls_with_the_first_power_of_the_step() -> None:
    errors = [(euler(gaussian_field, noise(), n) - (MEAN + STD * noise())).abs().mean() for n in (50, 100, 200)]
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


def test_a_single_target_is_reached_in_one_step() -> None:
    target, start = torch.full((500, 2, 4, 4), 0.7, dtype=torch.float64), noise()
    straight: Velocity = lambda x, t: (x - target) / t.reshape(-1, 1, 1, 1)  # noqa: E731
    assert torch.allclose(euler(straight, start, 1), target)
    assert torch.allclose(euler(straight, start, 7), target)


def test_times_run_evenly_from_one() -> None:
    seen: list[float] = []

    def record(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend(t.tolist())
        return torch.zeros_like(x)

    euler(record, torch.zeros(1, 1, 1, 1), 4)
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_guidance_extrapolates_from_the_empty_prompt() -> None:
    def network(x: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return x * 0 + timestep.reshape(-1, 1, 1, 1) + tokens.float().mean(1).reshape(-1, 1, 1, 1)

    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.25])
    tokens, empty = torch.tensor([[2, 2], [4, 4]]), torch.tensor([1, 1])
    plain = guided(network, tokens, empty, 1.0)(x, t)
    strong = guided(network, tokens, empty, 3.0)(x, t)
    assert plain[:, 0, 0, 0].tolist() == [502.0, 254.0]
    assert strong[:, 0, 0, 0].tolist() == [501.0 + 3 * 1, 251.0 + 3 * 3]


def test_without_guidance_the_network_sees_each_sample_once() -> None:
    sizes: list[int] = []

    def network(x: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x

    x, tokens, empty = torch.zeros(3, 1, 2, 2), torch.zeros(3, 4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    guided(network, tokens, empty, 1.0)(x, torch.ones(3))
    guided(network, tokens, empty, 2.0)(x, torch.ones(3))
    assert sizes == [3, 6]
