"""From noise to latents: Euler's method along the probability flow, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.objective import Denoiser, Network
from pipeline.diffusion.path import Path, RectifiedFlow, VariancePreserving

Conditional = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(input [b, C, h, w], embedding time [b], tokens [b, L]) -> output [b, C, h, w]."""

_RHO = 7.0  # Karras et al. 2022, table 1


def euler(denoise: Denoiser, path: Path, noise: Tensor, steps: int) -> Tensor:
    """Integrate from noise to data, d(x / alpha) = (x - alpha x0) / sigma d(sigma / alpha), by equal steps of Euler's.

    Song et al. 2021 (https://arxiv.org/abs/2010.02502), eq. 13 and 14: on every path this is DDIM without noise, and on
    rectified flow's it is Euler's method in t.

    Args:
        denoise: called `steps` times, first at pure noise.
        path: that the denoiser was trained on.
        noise: standard normal [b, C, h, w].
        steps: number of steps, 1 or more.

    Returns:
        latents, as noise.
    """
    times = _times(path, steps)
    alpha, sigma = [*path.alpha(times).tolist(), 1.0], [*path.sigma(times).tolist(), 0.0]
    x = path.prior_std * noise
    for step, t in enumerate(times.tolist()):
        x0 = denoise(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
        x = alpha[step + 1] * x0 + sigma[step + 1] / sigma[step] * (x - alpha[step] * x0)
    return x


def guided(network: Conditional, tokens: Tensor, empty: Tensor, scale: float) -> Network:
    """The network's output under classifier-free guidance.

    Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), eq. 6, with scale = 1 + w: out_empty + scale (out_text -
    out_empty). The denoised data are linear in the output, so that guidance of the one is guidance of the other.

    Args:
        network: called once a step, with both prompts in one batch.
        tokens: the prompts [b, L].
        empty: the empty prompt [L].
        scale: 1 = no guidance, and the empty prompt is not evaluated.
    """
    if scale == 1.0:
        return lambda x, time: network(x, time, tokens)
    both = torch.cat([tokens, empty.to(tokens).expand_as(tokens)])

    def output(x: Tensor, time: Tensor) -> Tensor:
        text, unconditional = network(x.repeat(2, 1, 1, 1), time.repeat(2), both).chunk(2)
        return unconditional + scale * (text - unconditional)

    return output


def _times(path: Path, steps: int) -> Tensor:
    """Where the network is asked, from t_max on: even in t, whole rows of a table, or as Karras et al. 2022, eq. 5."""
    ramp = torch.arange(steps, dtype=torch.float64) / steps
    if isinstance(path, RectifiedFlow):
        return path.t_max * (1 - ramp)
    if isinstance(path, VariancePreserving):
        return ((path.t_max + 1) * (1 - ramp)).round() - 1
    first, last = path.t_max ** (1 / _RHO), path.t_min ** (1 / _RHO)
    return torch.linspace(first, last, steps, dtype=torch.float64) ** _RHO
