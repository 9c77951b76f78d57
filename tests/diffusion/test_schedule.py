"""Rectified flow's path, its timesteps, and whitening."""

import pytest
import torch

from pipeline.diffusion.schedule import (
    interpolate,
    logit_normal,
    sample_posterior,
    timestep_embedding_input,
    unwhiten,
    velocity_target,
    whiten,
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


def test_whitened_latents_have_unit_moments() -> None:
    n, c = 4000, 3
    scale, shift = torch.tensor([0.2, 1.0, 7.0]), torch.tensor([-3.0, 0.5, 20.0])
    spread = 0.5  # of the posterior, as a share of each channel's scale
    posterior_mean = drawn(Purpose.NOISE, n, c, 2, 2) * scale[:, None, None] + shift[:, None, None]
    log_variance = (2 * torch.log(spread * scale))[:, None, None].expand(n, c, 2, 2)
    moments = torch.cat([posterior_mean, log_variance], 1)
    std = scale * (1 + spread**2) ** 0.5
    latents = whiten(moments, drawn(Purpose.POSTERIOR, n, c, 2, 2), shift, std)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(c), atol=0.04)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(c), atol=0.03)


def test_unwhiten_undoes_whiten() -> None:
    moments, eps = drawn(Purpose.NOISE, 5, 4, 2, 2).half(), drawn(Purpose.POSTERIOR, 5, 2, 2, 2)
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.1, 3.0])
    back = unwhiten(whiten(moments, eps, mean, std), mean, std)
    assert back.dtype == torch.float32
    assert torch.allclose(back, sample_posterior(moments, eps), atol=1e-5)


def test_log_variance_is_clipped_where_the_autoencoder_clips_it() -> None:
    moments = torch.tensor([0.0, 0.0, -1000.0, 1000.0]).reshape(1, 4, 1, 1)
    z = sample_posterior(moments, torch.ones(1, 2, 1, 1)).flatten().double()
    assert torch.allclose(z, torch.exp(torch.tensor([-15.0, 10.0], dtype=torch.float64)), rtol=1e-5)


def test_without_eps_the_posterior_gives_its_mean() -> None:
    moments = torch.tensor([3.0, 9.0]).reshape(1, 2, 1, 1)
    assert sample_posterior(moments, None).item() == 3.0
