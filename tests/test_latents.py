"""Posterior samples and whitening."""

import torch

from pipeline.latents import sample_posterior, unwhiten, whiten
from pipeline.randomness import Purpose, normal


def drawn(purpose: Purpose, *shape: int) -> torch.Tensor:
    return normal(0, purpose, 0, torch.arange(shape[0]), shape[1:])


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
