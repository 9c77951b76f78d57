"""What training does to a batch: a sample of the posterior, its scale, and captions that are dropped.

All that is random is keyed by (seed, step, position in the global batch), so it does not depend on the world size.

Legend: b samples, C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding,
P width of its pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import randomness
from pipeline.data.batch import TowerText
from pipeline.data.manifest import EMPTY_PREFIX, Manifest, Tower
from pipeline.data.tar import read_npy
from pipeline.errors import DataError
from pipeline.latents import sample_posterior, whiten
from pipeline.randomness import Purpose
from pipeline.storage import Store

Normalisation = Literal["whiten", "scaling_factor", "none"]
Posterior = Literal["sample", "mean"]


@dataclass(frozen=True)
class Scale:
    """What latents are brought to: unit variance by channel, the autoencoder's own convention, or nothing.

    Args:
        normalisation: "whiten" = (z - mean) / std; "scaling_factor" = (z - shift_factor) * scaling_factor, as
            diffusers' pipelines have it; "none" = as the autoencoder made them.
        mean: [C] over the data.
        std: [C] over the data.
        scaling_factor: of the autoencoder's config.
        shift_factor: of the autoencoder's config.
    """

    normalisation: Normalisation
    mean: Sequence[float]
    std: Sequence[float]
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class Preparation:
    """Moments to latents, and captions with some of them dropped, for the batches of one run.

    Args:
        seed: of the run.
        scale: of the latents.
        empty: the empty prompt as each tower has it, see `read_empty`.
        posterior: "sample" = a new sample at every step; "mean" = the posterior's mean.
        caption_dropout: share of captions replaced by the empty prompt.
        dropout_by_tower: each tower's captions are dropped apart; else a caption is dropped for all towers.
        device: where the tensors are that are given to it.
    """

    def __init__(
        self,
        seed: int,
        scale: Scale,
        empty: Mapping[str, TowerText],
        *,
        posterior: Posterior = "sample",
        caption_dropout: float = 0.0,
        dropout_by_tower: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._seed, self._scale, self._posterior = seed, scale, posterior
        self._dropout, self._by_tower = caption_dropout, dropout_by_tower
        self._mean, self._std = (torch.tensor(list(values), device=device) for values in (scale.mean, scale.std))
        self._empty = {name: text.with_all(lambda tensor: tensor.to(device)) for name, text in empty.items()}

    def latents(self, moments: Tensor, step: int, positions: Tensor) -> Tensor:
        """Normalised latents, float32 [b, C, h, w].

        Args:
            moments: [b, 2C, h, w], the posterior's mean and log-variance.
            step: of the run.
            positions: int64 [b], places in the global batch.
        """
        eps = None
        if self._posterior == "sample":
            shape = (moments.shape[1] // 2, *moments.shape[2:])
            eps = randomness.normal(self._seed, Purpose.POSTERIOR, step, positions, shape)
        if self._scale.normalisation == "whiten":
            return whiten(moments, eps, self._mean, self._std)
        latents = sample_posterior(moments, eps)
        if self._scale.normalisation == "none":
            return latents
        return (latents - self._scale.shift_factor) * self._scale.scaling_factor

    def dropped(self, step: int, positions: Tensor) -> dict[str, Tensor]:
        """Which captions each tower is not shown, bool [b]; arguments as for `latents`."""
        numbers = randomness.uniform(self._seed, Purpose.CAPTION_DROPOUT, step, positions, (len(self._empty),))
        drop = numbers < self._dropout
        return {name: drop[:, tower if self._by_tower else 0] for tower, name in enumerate(self._empty)}

    def text(self, text: Mapping[str, TowerText], step: int, positions: Tensor) -> dict[str, TowerText]:
        """Captions with the empty prompt in place of those that are dropped.

        Args:
            text: of each tower, as a batch has it.
            step: of the run.
            positions: int64 [b], places in the global batch.
        """
        if not self._dropout:
            return dict(text)
        dropped = self.dropped(step, positions)
        return {name: _replaced(captions, self._empty[name], dropped[name]) for name, captions in text.items()}


def read_empty(store: Store, manifest: Manifest) -> dict[str, TowerText]:
    """The empty prompt as each tower has it: arrays like a batch's, with b = 1.

    Args:
        store: the manifest's folder.
        manifest: tells towers, text mode and padding.

    Raises:
        DataError: a file is damaged, or of another shape than the manifest says.
        StorageError: it cannot be read.
    """
    mark = manifest.fingerprint
    if mark.text_mode != "cached":
        return {tower.name: _empty_tokens(store, tower) for tower in mark.text_towers}
    return {tower.name: _empty_embedding(store, tower, mark.text_padding == "trimmed") for tower in mark.text_towers}


def _empty_tokens(store: Store, tower: Tower) -> TowerText:
    tokens = _read(store, f"tokens.{tower.name}", np.uint16, (tower.context_length,))
    return TowerText(tokens=torch.from_numpy(tokens.astype(np.int64))[None])


def _empty_embedding(store: Store, tower: Tower, trimmed: bool) -> TowerText:
    whole = (tower.context_length, tower.width)
    found = _read(store, f"text.{tower.name}", np.float16, whole, shorter=trimmed)
    embedding = np.zeros(whole, np.float16)
    embedding[: len(found)] = found
    pooled = None
    if tower.pooled_width:
        pooled = torch.from_numpy(_read(store, f"pooled.{tower.name}", np.float16, (tower.pooled_width,)).copy())[None]
    mask = torch.arange(tower.context_length)[None] < len(found) if trimmed else None
    return TowerText(embeddings=torch.from_numpy(embedding)[None], pooled=pooled, mask=mask)


def _read(
    store: Store, stem: str, dtype: type[np.generic], shape: tuple[int, ...], *, shorter: bool = False
) -> NDArray[Any]:
    """An array of the empty prompt; with `shorter`, its first side may be less than `shape` says."""
    name = f"{EMPTY_PREFIX}{stem}.npy"
    remedy = f"delete {name}, and run `lathe encode` again, which writes it anew"
    where = f"{store.url.rstrip('/')}/{name}"
    try:
        found = read_npy(store.read(name))
    except DataError as error:
        raise DataError(f"{where}: {error.message}", remedy) from error
    fits = found.shape == shape or (shorter and found.shape[1:] == shape[1:] and 1 <= len(found) <= shape[0])
    if found.dtype != dtype or not fits:
        said = f"{np.dtype(dtype)} {list(shape)}{' or fewer tokens' if shorter else ''}"
        raise DataError(f"{where} is {found.dtype} {list(found.shape)}, the manifest says {said}", remedy)
    return found


def _replaced(captions: TowerText, empty: TowerText, drop: Tensor) -> TowerText:
    """The empty prompt in the rows where `drop` [b] is true."""

    def choose(here: Tensor | None, other: Tensor | None) -> Tensor | None:
        if here is None or other is None:
            return None
        return torch.where(drop.reshape(-1, *[1] * (here.ndim - 1)), other, here)

    return TowerText(**{name: choose(value, getattr(empty, name)) for name, value in vars(captions).items()})
