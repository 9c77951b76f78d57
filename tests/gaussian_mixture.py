"""A mixture of Gaussians, whose denoiser is known on every path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.path import Path
from pipeline.diffusion.prediction import over


class Mixture:
    """Round Gaussians in any number of dimensions.

    Args:
        weights: [K], of sum 1.
        means: [K, D].
        stds: [K].
    """

    def __init__(self, weights: list[float], means: list[list[float]], stds: list[float]) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        self.stds = torch.tensor(stds, dtype=torch.float64)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        part = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[part] + self.stds[part, None] * noise

    def denoiser(self, path: Path) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t]: each Gaussian's conditional mean, weighted by what the sample says of where it came from."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = over(path.alpha(t), x[..., None]), over(path.sigma(t), x[..., None])
            variance = (alpha[..., 0] * self.stds.to(x)) ** 2 + sigma[..., 0] ** 2  # [b, K]
            away = x[:, None, :] - alpha * self.means.to(x)  # [b, K, D]
            log_density = -away.square().sum(-1) / (2 * variance) - x.shape[1] / 2 * variance.log()
            share = torch.softmax(self.weights.to(x).log() + log_density, 1)
            guess = self.means.to(x) + (alpha[..., 0] * self.stds.to(x) ** 2 / variance)[..., None] * away
            return (share[..., None] * guess).sum(1)

        return denoise
