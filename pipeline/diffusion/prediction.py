"""What a network learns to say of a noisy sample, and the data that its output means.

x = alpha x0 + sigma eps throughout. Legend: b samples; x0, eps, x and outputs are [b, ...]; alpha, sigma are [b].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v", "x0", "velocity", "edm"]
"""The noise (Ho et al. 2020, eq. 14); v (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, section 4); the data;
noise - data (Liu et al. 2022, eq. 1); EDM's F (Karras et al. 2022, eq. 7 and table 1)."""


def target(  # noqa: PLR0917  (a formula's symbols)
    kind: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """What the network learns, as x0. For `edm`, (x0 - c_skip x) / c_out: Karras et al. 2022, eq. 8.

    Args:
        kind: what is predicted.
        x0: the data [b, ...].
        noise: eps, as x0.
        alpha: factor of the data [b].
        sigma: factor of the noise [b].
        sigma_data: standard deviation of the data; for `edm` alone.
    """
    if kind == "epsilon":
        return noise
    if kind == "x0":
        return x0
    if kind == "velocity":
        return noise - x0
    a, s = over(alpha, x0), over(sigma, x0)
    if kind == "v":
        return a * noise - s * x0
    # (x0 - c_skip (a x0 + s eps)) / c_out, without the difference of two numbers that are almost equal at small sigma
    spread = (s.square() + (a * sigma_data).square()).sqrt()
    return (s * x0 - a * sigma_data**2 * noise) / (sigma_data * spread)


def denoised(  # noqa: PLR0917  (a formula's symbols)
    kind: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """The data x0 that an output means, as x.

    From `epsilon` there is none at alpha = 0 (infinite or not a number).

    Args:
        kind: what was predicted.
        output: of the network [b, ...].
        x: the noisy sample, not scaled, as output.
        alpha: factor of the data [b].
        sigma: factor of the noise [b].
        sigma_data: standard deviation of the data; for `edm` alone.
    """
    a, s = over(alpha, x), over(sigma, x)
    if kind == "x0":
        return output
    if kind == "epsilon":
        return (x - s * output) / a
    if kind == "velocity":
        return (x - s * output) / (a + s)
    if kind == "v":
        return (a * x - s * output) / (a.square() + s.square())
    variance = s.square() + (a * sigma_data).square()
    return (a * sigma_data**2 * x + s * sigma_data * variance.sqrt() * output) / variance


def input_scale(kind: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """What the noisy sample is multiplied by before the network sees it, [b]: Karras' c_in for `edm`, else 1."""
    if kind != "edm":
        return torch.ones_like(sigma)
    return (sigma.square() + (alpha * sigma_data).square()).rsqrt()


def error_scale(kind: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Squared error of the denoised data over that of the output, [b]: turns weights of the one into the other's."""
    if kind == "x0":
        return torch.ones_like(sigma)
    if kind == "epsilon":
        return (sigma / alpha).square()
    if kind == "velocity":
        return (sigma / (alpha + sigma)).square()
    if kind == "v":
        return (sigma / (alpha.square() + sigma.square())).square()
    return (sigma * sigma_data).square() / (sigma.square() + (alpha * sigma_data).square())


def over(values: Tensor, samples: Tensor) -> Tensor:
    """Values [b], so that each meets its sample in arithmetic with [b, ...]."""
    return values.reshape(-1, *[1] * (samples.ndim - 1))
