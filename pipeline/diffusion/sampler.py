"""From noise to latents: Euler's method along the learned velocity, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.schedule import timestep_embedding_input

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [b, C, h, w], t [b] in [0, 1]) -> dx/dt [b, C, h, w]."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents [b, C, h, w], timesteps [b] in [0, 1000], tokens [b, L]) -> velocity [b, C, h, w]."""


def euler(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 (noise) to t = 0 (latents) in equal steps.

    Liu et al. 2022 (https://arxiv.org/abs/2209.03003), eq. 1 read as an ODE, backwards in t.

    Args:
        velocity: the field; called `steps` times, the last at t = 1 / steps.
        noise: standard normal [b, C, h, w].
        steps: number of steps, 1 or more.

    Returns:
        latents, as noise.
    """
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
    x = noise
    for t, following in pairwise(times):
        x = x + (following - t) * velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
    return x


def guided(network: Network, tokens: Tensor, empty: Tensor, scale: float) -> Velocity:
    """The network's velocity under classifier-free guidance.

    Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), eq. 6, with scale = 1 + w:
    v_empty + scale (v_text - v_empty).

    Args:
        network: predicts velocity; called once a step, with both prompts in one batch.
        tokens: the prompts [b, L].
        empty: the empty prompt [L].
        scale: 1 = no guidance, and the empty prompt is not evaluated.
    """
    if scale == 1.0:
        return lambda x, t: network(x, timestep_embedding_input(t), tokens)
    both = torch.cat([tokens, empty.to(tokens).expand_as(tokens)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        text, unconditional = network(x.repeat(2, 1, 1, 1), timestep_embedding_input(t).repeat(2), both).chunk(2)
        return unconditional + scale * (text - unconditional)

    return velocity
