"""Latents from the autoencoder's stored posterior: samples, and the scale in which the network sees them.

Shapes: b samples, C latent channels, h x w latent pixels. Every function is pure: randomness comes in as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Where the posterior's log-variance is clipped, as in latent diffusion (Rombach et al. 2022) and diffusers."""


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
