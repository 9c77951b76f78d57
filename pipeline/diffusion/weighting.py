"""How much each noise level counts: weights of the squared error of the denoised data, as functions of the SNR.

The SNR is alpha^2 / sigma^2. `prediction.error_scale` turns these weights into those of another prediction's error: for
epsilon, min(SNR, gamma) becomes min(SNR, gamma) / SNR, for v, min(SNR, gamma) / (SNR + 1).
"""

from __future__ import annotations

from torch import Tensor

_SMALLEST_SIGMA = 1e-8  # keeps the SNR finite where a time of exactly 0 is drawn


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio, at most 1e16."""
    return (alpha / sigma.clamp(min=_SMALLEST_SIGMA)).square()


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma): Hang et al. 2023 (https://arxiv.org/abs/2303.09556), section 3.4; gamma = 5 in the paper."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """SNR gamma / (SNR + gamma): Crowson et al. 2024 (https://arxiv.org/abs/2401.11605), HDiT; gamma = 4 there."""
    return gamma / (1 + gamma / snr)


def p2(snr: Tensor, gamma: float) -> Tensor:
    """SNR / (1 + SNR)^gamma, of epsilon's error 1 / (1 + SNR)^gamma: Choi et al. 2022 (https://arxiv.org/abs/2204.00227)."""
    return snr / (1 + snr).pow(gamma)


def edm(snr: Tensor, sigma_data: float) -> Tensor:
    """SNR + 1 / sigma_data^2: Karras et al. 2022, table 1, where alpha = 1 and the weight is a function of sigma.

    The error of `edm` predictions then has weight 1 at every noise level.
    """
    return snr + sigma_data**-2
