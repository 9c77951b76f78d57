"""The variational bound on the negative log-likelihood of latents, for DDPM's discrete path.

The generative model is the reverse chain of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, eq. 1) with the
posterior's own variances (eq. 7), which makes each term a multiple of the squared error of the denoised data: Kingma et
al. 2021 (https://arxiv.org/abs/2107.00630, eq. 13 and 14). Latents are continuous, so the last factor is a Gaussian
density and not a sum over pixel values; its variance is the first beta, as in Ho et al. The bound is one on a density,
and may be negative.

Legend: b samples, T rows of the path's table; all figures are nats per dimension of the latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.diffusion.objective import Objective
from pipeline.diffusion.path import VariancePreserving


def has_bound(objective: Objective) -> bool:
    """Whether training times estimate the bound: on a discrete path, with all rows drawn alike.

    Logit-normal times never meet the rows next to the data, which hold most of it; offset noise is not the chain's.
    """
    discrete = isinstance(objective.path, VariancePreserving)
    return discrete and objective.timesteps == "uniform" and not objective.offset_noise


def row_term(path: VariancePreserving, row: Tensor, error: Tensor) -> Tensor:
    """What one step of the chain adds to the bound, [b].

    Row 0 is the density of the data about their estimate; row t > 0 is KL(q(x_(t-1) | x_t, x0) || p(x_(t-1) | x_t)) =
    (SNR(t-1) - SNR(t)) error / 2.

    Args:
        path: the table.
        row: [b], whole numbers from 0 to T - 1.
        error: [b], squared error of the denoised data, mean over the dimensions.
    """
    table = path.alphas_cumprod.to(row.device)
    here = row.long()
    first_variance = 1 - table[0]
    density = 0.5 * torch.log(2 * math.pi * first_variance) + error / (2 * first_variance)
    ratios = table / (1 - table)
    return torch.where(here == 0, density, 0.5 * (ratios[here - 1] - ratios[here]) * error)


def end_term(path: VariancePreserving, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)), [b]: what is left of the data x0 [b, ...] where sampling begins."""
    left = path.alphas_cumprod[-1].to(x0.device)
    return 0.5 * (left * x0.double().square().flatten(1).mean(1) - left - torch.log1p(-left))


def bits(path: VariancePreserving, row_mean: float, end_mean: float) -> float:
    """The bound in bits per dimension.

    Args:
        path: the table.
        row_mean: mean of `row_term` over samples and rows drawn alike.
        end_mean: mean of `end_term` over samples.
    """
    return (len(path.alphas_cumprod) * row_mean + end_mean) / math.log(2)
