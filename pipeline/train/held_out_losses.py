"""Losses of held-out samples at noise and times that never change: they differ from step to step by the weights alone.

Legend: b samples of a batch, K parts of the noise levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.held_out import places, read_held_out
from pipeline.data.prepare import Scale
from pipeline.diffusion import variational_bound
from pipeline.diffusion.loss import squared_error
from pipeline.diffusion.objective import objective_of
from pipeline.models.conditioning import FrozenTowers
from pipeline.runtime.process import Process
from pipeline.train.draws import fixed_draw, fixed_times
from pipeline.train.examples import Examples
from pipeline.train.noise_levels import NoiseLevels


@dataclass(frozen=True)
class Losses:
    """Means over all held-out samples that are tried."""

    loss: float  # weighted as in training
    by_level: dict[str, float]  # squared error by part of the noise levels, see `HeldOutLosses.levels`
    bound_bits: float | None  # the variational bound in bits per dimension, where there is one


class HeldOutLosses:
    """What is held out, in memory, and the losses of it.

    Args:
        config: the run file.
        ranks: this rank among the others.
        datasets: the latents.
        scale: how they are whitened.
        batch_size: samples of a forward pass.
        towers: that run while training; None = none do.

    Raises:
        ConfigError, DataError, StorageError: see `read_held_out`.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Process,
        datasets: DataSets,
        scale: Scale,
        *,
        batch_size: int,
        towers: FrozenTowers | None = None,
    ) -> None:
        self._ranks, self._settings = ranks, config.validation
        self._objective = objective_of(config.objective, ranks.device)
        without_dropout = config.objective.model_copy(update={"caption_dropout": 0.0})
        fixed = config.model_copy(update={"seed": config.validation.seed, "objective": without_dropout})
        self._examples = Examples(fixed, datasets, scale, ranks.device, towers)
        self._batches = read_held_out(
            datasets,
            config.validation.samples,
            rank=ranks.rank,
            world_size=ranks.world_size,
            batch_size=batch_size,
        )
        self._row_weights = self._bound_weights(datasets) if variational_bound.has_bound(self._objective) else None
        self.levels = NoiseLevels(config).names
        """The parts of the noise levels sigma / sqrt(alpha^2 + sigma^2): number, to sort by, lower and upper end."""

    @torch.no_grad()
    def of(self, network: nn.Module, before_each: Callable[[], None]) -> Losses:
        """Losses of a network, on all ranks together and the same on all.

        Args:
            network: as `Example.inputs` calls it.
            before_each: called before each forward pass, as often on every rank.
        """
        parts, device = self._settings.noise_levels, self._ranks.device
        sums = torch.zeros(4, parts, dtype=torch.float64, device=device)  # `_terms` of each part
        for held in self._batches:
            batch = held.to(device)
            for part in range(parts):
                before_each()
                sums[:, part] += self._terms(network, batch, part)
        count = torch.tensor([[float(sum(batch.weight.sum() for batch in self._batches))]])
        counted = float(self._ranks.sum(count))
        error, weighted, bound_errors, ends = (self._ranks.sum(sums) / counted).unbind()
        bound = None
        if self._row_weights is not None:
            bound = variational_bound.bits(self._objective, float(bound_errors.sum()) * counted, float(ends.mean()))
        return Losses(float(weighted.mean()), dict(zip(self.levels, error.tolist(), strict=True)), bound)

    def _terms(self, network: nn.Module, batch: Batch, part: int) -> Tensor:
        """Sums over a batch of error, weighted error and what both give to the bound: float64 [4]."""
        settings, latents = self._settings, self._examples.latents(batch)
        noise, t = fixed_draw(
            self._objective,
            settings.seed,
            part,
            settings.noise_levels,
            positions=batch.positions,
            shape=tuple(latents.shape[1:]),
        )
        example = self._examples.at(batch, noise, t)
        error = squared_error(network(*example.inputs), example.target)
        bound_error = ends = torch.zeros_like(error)
        if self._row_weights is not None:
            bound_error = error * self._row_weights[t.long()]
            ends = variational_bound.end_term(self._objective, latents)
        terms = torch.stack([values.double() for values in (error, error * example.weight, bound_error, ends)])
        return torch.where(batch.weight > 0, terms, 0.0).sum(1)

    def _bound_weights(self, datasets: DataSets) -> Tensor:
        """What each error counts in the bound, by its row [T]; for that all ranks' rows are told beforehand."""
        settings = self._settings
        count = sum(len(found) for found in places(datasets.manifests, settings.samples).values())
        positions = torch.arange(count, device=self._ranks.device)
        rows = [
            fixed_times(self._objective, settings.seed, part, settings.noise_levels, positions=positions)
            for part in range(settings.noise_levels)
        ]
        return variational_bound.draw_weights(variational_bound.factors(self._objective), torch.cat(rows))
