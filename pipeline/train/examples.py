"""Batches of latents to what the network sees of them, and what it should say.

Legend: b samples of this rank in a step, C latent channels, h and w sides of the latent, L tokens of a caption,
D width of all text towers' states, P width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.batch import Batch, TowerText
from pipeline.data.datasets import DataSets
from pipeline.data.prepare import Preparation, Scale, read_empty
from pipeline.diffusion.objective import objective_of
from pipeline.errors import DataError
from pipeline.models.conditioning import Conditioning, FrozenTowers, States, joined
from pipeline.runtime.process import Process
from pipeline.train.draws import draw


class Example(NamedTuple):
    """What the network sees of a batch, and what it should say."""

    noisy: Tensor  # float32 [b, C, h, w]
    timestep: Tensor  # float32 [b], what the timestep embedding is given
    text: Tensor  # token ids int64 [b, L] for the network's own tower, or hidden states [b, L, D] of frozen ones
    mask: Tensor | None  # bool [b, L], True = token; None where padding is shown
    pooled: Tensor | None  # [b, P]; None where the UNet does not see sizes, as
    time_ids: Tensor | None  # float32 [b, 6]
    target: Tensor  # float32 [b, C, h, w]
    weight: Tensor  # float32 [b], of each sample's loss; 0 where it does not count
    noise_level: Tensor  # float32 [b], 0 is data, 1 is noise

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """What the network is called with, in its order."""
        return self.noisy, self.timestep, self.text, self.mask, self.pooled, self.time_ids

    def chunks(self, count: int) -> Iterator[Example]:
        """The example in `count` equal micro batches; what there is not, is in none of them."""
        parts = [[None] * count if part is None else part.chunk(count) for part in self]
        return (Example(*micro) for micro in zip(*parts, strict=True))


class Examples:
    """Latents, noise, time and caption of a batch; all that is random is keyed by (seed, step, position).

    Args:
        config: the run file.
        datasets: the latents; the first one's empty prompt is taken.
        scale: how they are whitened.
        device: where the network is.
        towers: frozen ones that run on token ids, on the same device; None = none do.

    Raises:
        StorageError: the empty prompt cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        datasets: DataSets,
        scale: Scale,
        device: torch.device,
        towers: FrozenTowers | None = None,
    ) -> None:
        self._config, self._device, self._towers = config, device, towers
        self._objective = objective_of(config.objective, device)
        self._prepare = Preparation(
            config.seed,
            scale,
            read_empty(datasets.stores[0], datasets.manifests[0]),
            caption_dropout=config.objective.caption_dropout,
            dropout_by_tower=config.objective.dropout_by_tower,
            device=device,
        )

    def of(self, batch: Batch, share: float) -> Example:
        """One step's.

        Args:
            batch: this rank's part.
            share: of the global batch that counts, see `Counted.share`.
        """
        config, batch = self._config, batch.to(self._device)
        channels, *sides = batch.moments.shape[1:]
        noise, t = draw(
            self._objective,
            config.seed,
            batch.step,
            batch.positions,
            shape=(channels // 2, *sides),
            global_batch=config.global_batch,
        )
        return self.at(batch, noise, t, share)

    def at(self, batch: Batch, noise: Tensor, t: Tensor, share: float = 1.0) -> Example:
        """The samples with this noise [b, C, h, w], at these times [b]; all of them are on the network's device."""
        shown = self._shown(self._prepare.text(batch.text, batch.step, batch.positions))
        sees_sizes = bool(self._config.unet.addition_embed_type)
        point = self._objective.at(self.latents(batch), noise, t)
        return Example(
            noisy=point.input,
            timestep=point.embedding,
            text=shown.text,
            mask=shown.mask,
            pooled=shown.pooled if sees_sizes else None,
            time_ids=batch.size.float() if sees_sizes else None,
            target=point.target,
            weight=point.weight * batch.weight / share,
            noise_level=point.noise_level,
        )

    def latents(self, batch: Batch) -> Tensor:
        """Whitened samples of the posterior, float32 [b, C, h, w]."""
        return self._prepare.latents(batch.moments, batch.step, batch.positions)

    def _shown(self, text: dict[str, TowerText]) -> Conditioning:
        """Captions as the text mode has them; check_data has seen to it that the batch does too."""
        tokens = {name: tower.tokens for name, tower in text.items() if tower.tokens is not None}
        if self._towers is not None:
            return self._towers.run(tokens)
        if tokens:
            (ids,) = tokens.values()
            return Conditioning(ids)
        stored = [(tower.embeddings, tower.pooled, tower.mask) for tower in text.values()]
        return joined(States(hidden, pooled, mask) for hidden, pooled, mask in stored if hidden is not None)


@dataclass
class Counted:
    """Samples of all ranks that were drawn, and those of them that were skipped, over all restarts."""

    drawn: int = 0
    in_vain: int = 0

    def share(self, batch: Batch, ranks: Process, config: TrainConfig, samples: int) -> float:
        """Share of the global batch that was not skipped: the loss is the mean of that, on any number of ranks.

        Args:
            batch: this rank's part.
            ranks: all of them call it.
            config: the run file.
            samples: of the data sets.

        Raises:
            DataError: more were skipped than `loader.max_skip_rate` allows.
        """
        counted = float(ranks.sum(batch.weight.sum()))
        self.drawn += config.global_batch
        self.in_vain += config.global_batch - round(counted)
        limit = config.loader.max_skip_rate
        if self.in_vain > limit * max(self.drawn, samples):
            raise DataError(
                f"{self.in_vain} of the {self.drawn} samples drawn could not be read, more than"
                f" loader.max_skip_rate={limit:g} allows",
                "mend the latents (`lathe verify` tells what is damaged), or allow for more",
            )
        return max(counted, 1.0) / config.global_batch
