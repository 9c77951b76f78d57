"""Rectified flow: the straight path between latent (t = 0) and noise (t = 1), its timesteps, and whitened latents.

Shapes: b samples, C latent channels, h x w latent pixels. Every function is pure: randomness comes in as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Where the posterior's log-variance is clipped, as in latent diffusion (Rombach et al. 2022) and diffusers."""

TIMESTEP_SCALE = 1000.0
"""t = 1 in the units of the network's timestep embedding, as diffusers' schedulers pass it (sigma * 1000)."""


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t of the straight path from latents to noise: (1 - t) x0 + t noise.

    Liu et al. 2022 (https://arxiv.org/abs/2209.03003), eq. 1, in the direction of Esser et al. 2024
    (https://arxiv.org/abs/2403.03206), eq. 13: t = 0 is data, t = 1 is noise.

    Args:
        x0: latents [b, C, h, w].
        noise: standard normal, as x0.
        t: [b] in [0, 1].
    """
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network learns: the path's derivative in t, noise - x0 (Liu et al. 2022, eq. 1). Shapes as x0."""
    return noise - x0


def timestep_embedding_input(t: Tensor) -> Tensor:
    """Times [b] in [0, 1] to the network's timesteps in [0, 1000]."""
    return TIMESTEP_SCALE * t


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Logit-normal times in (0, 1): sigmoid(mean + std * normal), Esser et al. 2024, eq. 19.

    Args:
        normal: standard normal numbers, any shape.
        mean: location of logit(t); above 0 leans to noise.
        std: scale of logit(t).
    """
    return torch.sigmoid(mean + std * normal)


def sample_posterior(moments: Tensor, eps: Tensor | None) -> Tensor:
    """A latent from the autoencoder's diagonal Gaussian posterior: mean + exp(logvar / 2) * eps, in float32.

    Args:
        moments: [b, 2C, h, w], the means, then the log-variances; any float dtype.
        eps: standard normal [b, C, h, w]; None gives the posterior's mean.

    Returns:
        raw latents [b, C, h, w].
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if eps is None:
        return mean
    return mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)) * eps


def whiten(moments: Tensor, eps: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """A posterior sample with zero mean and unit variance per channel over the data set: (z - mean) / std.

    Args:
        moments: as for `sample_posterior`.
        eps: as for `sample_posterior`.
        mean: [C], each channel's mean over the data set.
        std: [C], each channel's standard deviation over the data set.

    Returns:
        whitened latents [b, C, h, w], float32.
    """
    return (sample_posterior(moments, eps) - _per_channel(mean)) / _per_channel(std)


def unwhiten(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Whitened latents [b, C, h, w] back to the autoencoder's own scale; mean and std [C] as for `whiten`."""
    return latents * _per_channel(std) + _per_channel(mean)


def _per_channel(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)
