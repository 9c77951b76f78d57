"""How data become noise: x_t = alpha(t) x0 + sigma(t) eps, with eps standard normal, for the three paths in use.

Samplers and objectives know a path by these functions alone. All is pure; t is [b], or any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0
"""t = 1 of rectified flow in the units of the network's timestep embedding, as diffusers passes it (sigma * 1000)."""

TABLE_ROWS = 1000
"""Times of a variance-preserving path, as in Ho et al. 2020 and in every model of diffusers."""


LINEAR_BETAS = (1e-4, 0.02)
"""Ho et al. 2020 (https://arxiv.org/abs/2006.11239), section 4."""

SCALED_LINEAR_BETAS = (0.00085, 0.012)
"""Stable Diffusion, Rombach et al. 2022 (https://arxiv.org/abs/2112.10752)."""


class Path(ABC):
    """Signal and noise as functions of the time t; all of them return t's shape and dtype.

    Args:
        t_min: the data end of what is trained and sampled.
        t_max: the noise end.
        prior_std: standard deviation of x at t_max, where sampling begins.
    """

    t_min: float
    t_max: float
    prior_std: float

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The t whose sigma / alpha is `ratio`; a ratio may be 0 or infinite; beyond a table's ends, its end."""

    @abstractmethod
    def embedding_input(self, t: Tensor) -> Tensor:
        """What the network's timestep embedding is given."""

    def to(self, device: torch.device | str) -> Path:
        """The path with its tables, if it has any, on a device: functions of t there then copy nothing."""
        del device
        return self


class RectifiedFlow(Path):
    """The straight path, (1 - t) x0 + t eps: t = 0 is data, t = 1 is noise.

    Liu et al. 2022 (https://arxiv.org/abs/2209.03003), eq. 1, in the direction of Esser et al. 2024
    (https://arxiv.org/abs/2403.03206), eq. 13.
    """

    t_min = 0.0
    t_max = 1.0
    prior_std = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def time_of(self, ratio: Tensor) -> Tensor:
        """ratio / (1 + ratio), 1 for infinity."""
        return 1 / (1 + 1 / ratio)

    def embedding_input(self, t: Tensor) -> Tensor:
        """1000 t."""
        return TIMESTEP_SCALE * t


class VariancePreserving(Path):
    """DDPM's path: alpha^2 + sigma^2 = 1, from a table of alpha^2 at t = 0, 1, ... T - 1.

    Ho et al. 2020 (https://arxiv.org/abs/2006.11239), eq. 4. Between the table's rows, log(sigma / alpha) is linear in
    t; where the last row is pure noise, alpha is linear in t over the last interval.

    Args:
        alphas_cumprod: float64 [T], falling; the last may be 0.
        t_max: where sampling begins; None = the last row.
    """

    t_min = 0.0
    prior_std = 1.0

    def __init__(self, alphas_cumprod: Tensor, t_max: float | None = None) -> None:
        self.alphas_cumprod = alphas_cumprod.double()
        self.t_max = float(len(alphas_cumprod) - 1) if t_max is None else t_max
        self._log_ratios = (torch.log1p(-self.alphas_cumprod) - torch.log(self.alphas_cumprod)) / 2

    @classmethod
    def linear(
        cls, beta_start: float = LINEAR_BETAS[0], beta_end: float = LINEAR_BETAS[1], steps: int = TABLE_ROWS
    ) -> VariancePreserving:
        """Betas that grow linearly, as in DDPM."""
        return cls._of_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls,
        beta_start: float = SCALED_LINEAR_BETAS[0],
        beta_end: float = SCALED_LINEAR_BETAS[1],
        steps: int = TABLE_ROWS,
    ) -> VariancePreserving:
        """Betas whose roots grow linearly, as in Stable Diffusion."""
        return cls._of_betas(torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square())

    @classmethod
    def cosine(cls, steps: int = TABLE_ROWS) -> VariancePreserving:
        """alpha^2 as a squared cosine: Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), eq. 17."""
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        squared = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
        return cls._of_betas((1 - squared[1:] / squared[:-1]).clamp(max=0.999))

    @classmethod
    def _of_betas(cls, betas: Tensor) -> VariancePreserving:
        return cls(torch.cumprod(1 - betas, 0))

    def rescaled_to_zero_terminal_snr(self) -> VariancePreserving:
        """The same first row, and pure noise last: Lin et al. 2023 (https://arxiv.org/abs/2305.08891), algorithm 1."""
        roots = self.alphas_cumprod.sqrt()
        first, last = roots[0], roots[-1]
        return VariancePreserving(((roots - last) * first / (first - last)).square())

    def beginning_at(self, log_snr: float) -> VariancePreserving:
        """The same, sampled from the last row on whose log-SNR, 2 ln(alpha / sigma), is at least this."""
        rows = int((self._log_ratios <= -log_snr / 2).sum())
        return VariancePreserving(self.alphas_cumprod, float(rows - 1))

    def to(self, device: torch.device | str) -> VariancePreserving:
        """A copy with its table on a device."""
        return VariancePreserving(self.alphas_cumprod.to(device), self.t_max)

    def alpha(self, t: Tensor) -> Tensor:
        """The root of the table's row."""
        return torch.sigmoid(-2 * self._log_ratio(t)).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """The root of 1 - alpha^2."""
        return torch.sigmoid(2 * self._log_ratio(t)).sqrt().to(t.dtype)

    def time_of(self, ratio: Tensor) -> Tensor:
        """Row and fraction of the interval that holds the ratio."""
        wanted = ratio.double().log()
        table = self._log_ratios.to(ratio.device)
        row = (torch.searchsorted(table, wanted, right=True) - 1).clamp(0, len(table) - 2)
        low, high = table[row], table[row + 1]
        fraction = (wanted - low) / (high - low)
        at_the_end = 1 - (torch.sigmoid(-2 * wanted) / torch.sigmoid(-2 * low)).sqrt()
        return (row + torch.where(high.isinf(), at_the_end, fraction)).clamp(0, len(table) - 1).to(ratio.dtype)

    def embedding_input(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def _log_ratio(self, t: Tensor) -> Tensor:
        """log(sigma / alpha), float64."""
        table, exact = self._log_ratios.to(t.device), t.double()
        row = exact.floor().clamp(0, len(table) - 2).long()
        low, high, fraction = table[row], table[row + 1], exact - row
        alpha = (1 - fraction) * torch.sigmoid(-2 * low).sqrt()
        at_the_end = torch.log1p(-alpha.square()) / 2 - alpha.log()
        return torch.where(high.isinf(), at_the_end, low + fraction * (high - low))


class VarianceExploding(Path):
    """Data with noise of standard deviation t added: Karras et al. 2022 (https://arxiv.org/abs/2206.00364), table 1.

    Args:
        sigma_min: where sampling ends, before its last step to 0.
        sigma_max: where it begins.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.t_min, self.t_max, self.prior_std = sigma_min, sigma_max, sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def time_of(self, ratio: Tensor) -> Tensor:
        """The ratio itself."""
        return ratio

    def embedding_input(self, t: Tensor) -> Tensor:
        """ln(t) / 4, the paper's c_noise."""
        return t.log() / 4
