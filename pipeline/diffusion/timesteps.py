"""Random numbers to the times that a network is trained at.

Legend: b samples of this rank, B of the global batch. Uniform numbers are in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Logit-normal numbers in (0, 1): sigmoid(mean + std * normal), Esser et al. 2024, eq. 19.

    Args:
        normal: standard normal numbers, any shape.
        mean: location of logit(t); above 0 leans to noise.
        std: scale of logit(t).
    """
    return torch.sigmoid(mean + std * normal)


def log_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Log-normal noise levels sigma: exp(mean + std * normal), Karras et al. 2022, table 1 (P_mean, P_std).

    Args:
        normal: standard normal numbers, any shape.
        mean: location of ln(sigma).
        std: scale of ln(sigma).
    """
    return torch.exp(mean + std * normal)


def row(unit: Tensor, rows: int) -> Tensor:
    """Numbers in [0, 1] to rows 0, 1, ... rows - 1 of a table, each an equal part of the range; as unit's dtype."""
    return (unit * rows).floor().clamp(max=rows - 1)


def stratified(uniform: Tensor, positions: Tensor) -> Tensor:
    """One number in each of B equal parts of (0, 1), so that every global batch covers the range: float64 [b].

    Which part a position gets is a permutation of its own at every step; nothing depends on the world size.
    Stratification as in Kingma et al. 2021 (https://arxiv.org/abs/2107.00630), appendix I.1, with independent places
    within the parts.

    Args:
        uniform: [B, 2] of all positions of the global batch: sort keys, and places within the part.
        positions: int64 [b], places in the global batch.
    """
    part = uniform[:, 0].argsort(stable=True)[positions]
    place = uniform[:, 1][positions].double() + 2.0**-25  # the middle of a float32 uniform number's cell, never 0 or 1
    return (part + place) / len(uniform)


def normal_of(unit: Tensor) -> Tensor:
    """The standard normal numbers whose quantiles are in (0, 1)."""
    normal: Tensor = torch.special.ndtri(unit)
    return normal
