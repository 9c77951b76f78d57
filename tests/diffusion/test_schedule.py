"""Rectified flow's path and its timesteps."""

import pytest
import torch

from pipeline.diffusion.schedule import (
    interpolate,
    logit_normal,
    timestep_embedding_input,
    velocity_target,
)
from pipeline.randomness import Purpose, normal


def drawn(purpose: Purpose, *shape: int) -> torch.Tensor:
    return normal(0, purpose, 0, torch.arange(shape[0]), shape[1:])


def test_the_path_runs_from_latents_to_noise_with_constant_velocity() -> None:
    x0, noise = drawn(Purpose.POSTERIOR, 3, 2, 4, 4), drawn(Purpose.NOISE, 3, 2, 4, 4)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    t = torch.tensor([0.1, 0.5, 0.8])
    x_t = interpolate(x0, noise, t)
    v = velocity_target(x0, noise)
    assert torch.allclose(x_t - t[:, None, None, None] * v, x0, atol=1e-6)
    assert torch.allclose(x_t[1], (x0[1] + noise[1]) / 2)  # each sample has its own t


def test_timesteps_are_in_thousandths() -> None:
    assert timestep_embedding_input(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 1.5)])
def test_logit_normal_has_the_quantiles_of_the_paper(mean: float, std: float) -> None:
    t = logit_normal(drawn(Purpose.TIMESTEP, 200_000), mean, std).double()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    exact = torch.sigmoid(mean + std * torch.special.ndtri(levels))
    assert torch.allclose(torch.quantile(t, levels), exact, atol=0.005)
