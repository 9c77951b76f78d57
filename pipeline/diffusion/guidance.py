"""Classifier-free guidance of the denoised data: a network that knows prompts becomes a denoiser for samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.objective import Denoiser, Objective
from pipeline.diffusion.prediction import over

Conditional = Callable[..., Tensor]
"""(input [b, C, h, w], embedding time [b], conditions [b, ...]) -> output [b, C, h, w]."""

Conditions = Sequence[Tensor | None]
"""What a network is told beside input and time, each [b, ...] or None: token ids, sizes."""


def guided(
    network: Conditional,
    objective: Objective,
    prompts: Conditions,
    empty: Conditions,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """The data that the network sees in noisy samples, drawn away from what it sees without a prompt.

    x0_empty + scale (x0_text - x0_empty): Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), eq. 6, scale = 1 + w.
    The data are linear in the network's output, so that this is guidance of the output, whatever it is.

    Args:
        network: called once for each time, with both prompts in one batch where guidance acts.
        objective: what it was trained with.
        prompts: the conditions of b prompts.
        empty: of the empty prompt, [1, ...] each, or [b, ...].
        scale: 1 = no guidance, and the empty prompt is not evaluated.
        rescale: share of `rescaled` in the result; 0 = off.
        interval: sigma / alpha between which guidance acts, the lower end left out; beyond it the empty prompt is not
            evaluated. Kynkaanniemi et al. 2024 (https://arxiv.org/abs/2404.07724), eq. 6. None = everywhere.
    """
    plain = objective.denoiser(lambda x, time: network(x, time, *prompts))
    if scale == 1.0:
        return plain
    pairs = [_pair(*told) for told in zip(prompts, empty, strict=True)]
    both = objective.denoiser(lambda x, time: network(x, time, *pairs))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        acts = torch.ones_like(t, dtype=torch.bool)
        if interval:
            ratio = objective.path.sigma(t) / objective.path.alpha(t)
            acts = (interval[0] < ratio) & (ratio <= interval[1])
            if not bool(acts.any()):
                return plain(x, t)
        text, unconditional = both(torch.cat([x, x]), t.repeat(2)).chunk(2)
        strong = unconditional + scale * (text - unconditional)
        strong = rescale * rescaled(strong, text) + (1 - rescale) * strong if rescale else strong
        return torch.where(over(acts, x), strong, text)

    return denoise


def _pair(prompts: Tensor | None, empty: Tensor | None) -> Tensor | None:
    """Prompts, then as many times the empty one [2b, ...]."""
    if prompts is None or empty is None:
        return None
    return torch.cat([prompts, empty.to(prompts).expand_as(prompts)])


def rescaled(strong: Tensor, text: Tensor) -> Tensor:
    """Guided data with the standard deviation that each sample has without guidance.

    Lin et al. 2023 (https://arxiv.org/abs/2305.08891), eq. 15, of the denoised data.

    Args:
        strong: guided [b, ...].
        text: not guided, as strong.
    """
    return strong * over(text.flatten(1).std(1) / strong.flatten(1).std(1), strong)
