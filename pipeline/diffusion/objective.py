"""What a run learns, in one place: how data become noise, what the network says of it, which noise levels count.

Legend: b samples of this rank in a step, B of the global batch, C channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion import prediction, timesteps, weighting
from pipeline.diffusion.path import Path, RectifiedFlow, VarianceExploding, VariancePreserving
from pipeline.diffusion.prediction import Prediction, over

SIGMA_DATA = 1.0
"""Standard deviation of what is trained on: latents are whitened."""

SIGMA_MIN, SIGMA_MAX = 0.004, 160.0
"""Where EDM's sampling ends and begins: Karras et al. 2022, table 1, times 2, since their data have half the spread."""

EPSILON_LOG_SNR = -10.2
"""Sampling by epsilon begins here, not lower, where x0 is a small difference divided by almost nothing. It matters to
the cosine schedule alone; diffusers advises `lambda_min_clipped` = -5.1 there, which is half the log-SNR."""

Numbers = Literal["uniform", "normal", "stratified"]

Network = Callable[[Tensor, Tensor], Tensor]
"""(input [b, C, h, w], embedding time [b]) -> output [b, C, h, w]."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy sample [b, C, h, w], t [b]) -> the data in it [b, C, h, w]."""


class Point(NamedTuple):
    """Noisy samples as the network sees them, and what it should say."""

    input: Tensor  # [b, C, h, w], scaled where the objective scales
    embedding: Tensor  # [b], what the timestep embedding is given
    target: Tensor  # [b, C, h, w]
    weight: Tensor  # [b], of each sample's squared error
    noise_level: Tensor  # [b], sigma / sqrt(alpha^2 + sigma^2): 0 is data, 1 is noise, under every objective


@dataclass(frozen=True)
class Objective:
    """What is learned; its methods are pure functions.

    Args:
        path: how data become noise.
        prediction: what the network says.
        timesteps: distribution of the training times.
        mean: its location, where it has one.
        std: its scale.
        stratified: one time in each of B equal parts of the distribution.
        weighting: of the noise levels.
        weighting_parameter: gamma, where the weighting has one.
        offset_noise: scale of noise that is constant over a channel.
        sigma_data: standard deviation of the data, for `edm` alone.
    """

    path: Path
    prediction: Prediction
    timesteps: Literal["uniform", "logit_normal", "log_normal"]
    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False
    weighting: Literal["none", "min_snr", "soft_min_snr", "p2", "edm"] = "none"
    weighting_parameter: float = 1.0
    offset_noise: float = 0.0
    sigma_data: float = SIGMA_DATA

    @property
    def numbers(self) -> Numbers:
        """Which random numbers `times` takes: uniform [b], normal [b], or uniform [B, 2] of the whole global batch."""
        if self.stratified:
            return "stratified"
        return "uniform" if self.timesteps == "uniform" else "normal"

    def times(self, numbers: Tensor, positions: Tensor) -> Tensor:
        """The times to train at, float32 [b].

        Args:
            numbers: as `self.numbers` says.
            positions: int64 [b], places in the global batch; what is stratified depends on them.
        """
        return self.times_at(timesteps.stratified(numbers, positions)) if self.stratified else self._times(numbers)

    def times_at(self, quantiles: Tensor) -> Tensor:
        """The times at quantiles of their distribution, which are in (0, 1): float32, of the same shape."""
        return self._times(quantiles if self.timesteps == "uniform" else timesteps.normal_of(quantiles))

    def _times(self, numbers: Tensor) -> Tensor:
        """The times that uniform or normal numbers mean, as the distribution has it."""
        if self.timesteps == "log_normal":
            return timesteps.log_normal(numbers, self.mean, self.std).float()
        unit = numbers if self.timesteps == "uniform" else timesteps.logit_normal(numbers, self.mean, self.std)
        if isinstance(self.path, VariancePreserving):
            unit = timesteps.row(unit, len(self.path.alphas_cumprod))
        return unit.float()

    def with_offset(self, noise: Tensor, offset: Tensor) -> Tensor:
        """Noise whose mean by sample and channel is spread as well.

        Guttenberg 2023 (https://www.crosslabs.org/blog/diffusion-with-offset-noise), as in diffusers' training scripts.

        Args:
            noise: standard normal [b, C, h, w].
            offset: standard normal [b, C].
        """
        return noise + self.offset_noise * offset[:, :, None, None]

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Point:
        """The samples at times t.

        Args:
            x0: latents [b, C, h, w].
            noise: as x0.
            t: [b].
        """
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        noisy = over(alpha, x0) * x0 + over(sigma, x0) * noise
        return Point(
            input=noisy * over(prediction.input_scale(self.prediction, alpha, sigma, self.sigma_data), x0),
            embedding=self.path.embedding_input(t),
            target=prediction.target(self.prediction, x0, noise, alpha, sigma, self.sigma_data),
            weight=self._weight(alpha, sigma),
            noise_level=self.noise_level(t),
        )

    def noise_level(self, t: Tensor) -> Tensor:
        """sigma / sqrt(alpha^2 + sigma^2): 0 is data, 1 is noise, under every objective."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return sigma / torch.hypot(alpha, sigma)

    def denoised_error(self, error: Tensor, t: Tensor) -> Tensor:
        """Squared error of the data that outputs mean, from that of the outputs [b], at times t [b]."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return error * prediction.error_scale(self.prediction, alpha, sigma, self.sigma_data)

    def denoiser(self, network: Network) -> Denoiser:
        """The data that a network sees in noisy samples, in their dtype, whatever the network's: for samplers."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            scale = prediction.input_scale(self.prediction, alpha, sigma, self.sigma_data)
            output = network(x * over(scale, x), self.path.embedding_input(t)).to(x.dtype)
            return prediction.denoised(self.prediction, output, x, alpha, sigma, self.sigma_data)

        return denoise

    def _weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.weighting == "none":
            return torch.ones_like(sigma)
        snr, gamma = weighting.snr(alpha, sigma), self.weighting_parameter
        if self.weighting == "min_snr":
            weight = weighting.min_snr(snr, gamma)
        elif self.weighting == "soft_min_snr":
            weight = weighting.soft_min_snr(snr, gamma)
        elif self.weighting == "p2":
            weight = weighting.p2(snr, gamma)
        else:
            weight = weighting.edm(snr, self.sigma_data)
        return weight * prediction.error_scale(self.prediction, alpha, sigma, self.sigma_data)


def objective_of(config: ObjectiveConfig, device: torch.device | str = "cpu") -> Objective:
    """The objective that a run file asks for, with its tables on a device."""
    return Objective(
        path=_path(config).to(device),
        prediction=config.prediction,
        timesteps=config.timesteps,
        mean=config.timestep_mean or 0.0,
        std=config.timestep_std or 1.0,
        stratified=config.stratified,
        weighting=config.weighting,
        weighting_parameter=config.weighting_parameter or 1.0,
        offset_noise=config.offset_noise,
    )


def _path(config: ObjectiveConfig) -> Path:
    if config.kind == "rectified_flow":
        return RectifiedFlow()
    if config.kind == "edm":
        return VarianceExploding(SIGMA_MIN, SIGMA_MAX)
    if config.schedule == "cosine":
        path = VariancePreserving.cosine()
    else:
        path = VariancePreserving.linear() if config.schedule == "linear" else VariancePreserving.scaled_linear()
    if config.zero_terminal_snr:
        return path.rescaled_to_zero_terminal_snr()
    return path.beginning_at(EPSILON_LOG_SNR) if config.prediction == "epsilon" else path
