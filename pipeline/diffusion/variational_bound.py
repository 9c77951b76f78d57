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
    """Whether errors at training times tell the bound: on a discrete path, where times are spread over all rows.

    Logit-normal times never meet the rows next to the data, which hold much of it; offset noise is not the chain's.
    """
    discrete = isinstance(objective.path, VariancePreserving)
    return discrete and objective.timesteps == "uniform" and not objective.offset_noise


def factors(objective: Objective) -> Tensor:
    """What the squared error of the network's output adds to the bound at each row: float64 [T], on the path's device.

    Row 0 is the density of the data about their estimate; row t > 0 is KL(q(x_(t-1) | x_t, x0) || p(x_(t-1) | x_t)) =
    (SNR(t-1) - SNR(t)) / 2 times the squared error of the denoised data, mean over the dimensions.
    """
    path = _discrete(objective)
    ratios = path.alphas_cumprod / (1 - path.alphas_cumprod)
    of_data = torch.cat([0.5 / (1 - path.alphas_cumprod[:1]), 0.5 * (ratios[:-1] - ratios[1:])])
    rows = torch.arange(len(ratios), dtype=torch.float64, device=ratios.device)
    return objective.denoised_error(of_data, rows)


def draw_weights(factors: Tensor, rows: Tensor) -> Tensor:
    """The sum over all rows, from draws at some of them: what the error of each draw counts, by its row.

    However often a row was drawn, it counts once; one that never was counts with the nearest that was.

    Args:
        factors: [T].
        rows: of all draws, whole numbers from 0 to T - 1: [N], any order.

    Returns:
        [T]; 0 for rows that were not drawn.
    """
    drawn, counts = torch.unique(rows.long(), return_counts=True)
    everywhere = torch.arange(len(factors), device=factors.device)
    after = torch.searchsorted(drawn, everywhere).clamp(max=len(drawn) - 1)
    before = (after - 1).clamp(min=0)
    nearest = torch.where((everywhere - drawn[before]).abs() < (drawn[after] - everywhere).abs(), before, after)
    sums = torch.zeros(len(drawn), dtype=factors.dtype, device=factors.device).index_add(0, nearest, factors)
    return torch.zeros_like(factors).index_copy(0, drawn, sums / counts)


def end_term(objective: Objective, x0: Tensor) -> Tensor:
    """KL(q(x_T | x0) || N(0, 1)), [b]: what is left of the data x0 [b, ...] where sampling begins."""
    left = _discrete(objective).alphas_cumprod[-1]
    return 0.5 * (left * x0.double().square().flatten(1).mean(1) - left - torch.log1p(-left))


def bits(objective: Objective, errors: float, ends: float) -> float:
    """The bound in bits per dimension.

    Args:
        objective: that has one.
        errors: the sum over all rows of factor times squared error, mean over samples.
        ends: mean of `end_term` over samples.
    """
    constant = 0.5 * torch.log(2 * math.pi * (1 - _discrete(objective).alphas_cumprod[0]))  # of row 0's density
    return (errors + ends + float(constant)) / math.log(2)


def _discrete(objective: Objective) -> VariancePreserving:
    assert isinstance(objective.path, VariancePreserving), "no bound"  # noqa: S101  see has_bound
    return objective.path
