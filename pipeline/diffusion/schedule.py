"""Rectified flow: the straight path between latent (t = 0) and noise (t = 1), and its timesteps.

Shapes: b samples, C latent channels, h x w latent pixels. Every function is pure: randomness comes in as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
