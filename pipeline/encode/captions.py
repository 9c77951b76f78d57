"""Captions of one encode job: to token ids, or to what frozen text towers make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import EncodeTextConfig, TowerConfig
from pipeline.data.manifest import Tower, digest_of
from pipeline.encode.latent_shard import Text
from pipeline.errors import ConfigError
from pipeline.models.frozen_text import FrozenTower
from pipeline.models.text import Tokenizer

JOINT = "clip"  # the name of the one tower that is trained with the UNet


class CaptionEncoder:
    """Captions to arrays, by the tokenizer of each tower, and by the towers where `cached` is asked for.

    Args:
        config: the text section.
        device: where frozen towers run.
        batch_size: captions that they take at once.

    Raises:
        ConfigError: a tower has fewer positions than `context_length`, or there is no such tower.
        DataError, StorageError: a tower cannot be loaded.
    """

    def __init__(self, config: EncodeTextConfig, device: torch.device, batch_size: int) -> None:
        self._config = config
        self._device = device
        self._batch_size = batch_size
        # Of its own, so that waiting for text does not mean waiting for the pictures that were enqueued before.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        towers = config.towers or (TowerConfig(name=JOINT, model=JOINT),)
        self._tokenizers = {tower.name: Tokenizer(config.context_length, tower.pad) for tower in towers}
        cached = config.towers if config.mode == "cached" else ()
        self._frozen = {tower.name: self._load(tower, config.precision) for tower in cached}
        self._float32: dict[str, FrozenTower] = {}  # loaded when a caption needs it
        self.towers: tuple[Tower, ...] = tuple(self._describe(tower) for tower in towers)

    def __call__(self, captions: Sequence[str]) -> list[Text]:
        """One dictionary for each caption.

        Returns:
            `tokens.NAME` uint16 [L] of each tower; or, cached, `text.NAME` float16 [L, D] (with padding=trimmed the
            caption's own tokens alone) and, where asked for, `pooled.NAME` float16 [P].
        """
        rows: list[Text] = [{} for _ in captions]
        for name, tokenizer in self._tokenizers.items():
            ids = tokenizer(captions)
            if name not in self._frozen:
                for row, tokens in zip(rows, ids, strict=True):
                    row[f"tokens.{name}"] = tokens
                continue
            trimmed = self._config.padding == "trimmed"
            for row, length, (hidden, pooled) in zip(rows, tokenizer.lengths(ids), self._run(name, ids), strict=True):
                row[f"text.{name}"] = hidden[:length].copy() if trimmed else hidden  # a view would keep the whole
                if pooled is not None:
                    row[f"pooled.{name}"] = pooled
        return rows

    def _load(self, tower: TowerConfig, precision: str) -> FrozenTower:
        frozen = FrozenTower(tower, self._device, precision)
        if self._config.context_length > frozen.context_length:
            raise ConfigError(
                f"text.context_length: {self._config.context_length} is more than the {frozen.context_length} tokens"
                f" of tower {tower.name}",
                f"set it to {frozen.context_length}",
            )
        return frozen

    def _describe(self, tower: TowerConfig) -> Tower:
        tokenizer = digest_of(self._tokenizers[tower.name].fingerprint())
        frozen = self._frozen.get(tower.name)
        if frozen is None:
            return Tower(name=tower.name, tokenizer=tokenizer, context_length=self._config.context_length)
        return Tower(
            name=tower.name,
            tokenizer=tokenizer,
            context_length=self._config.context_length,
            weights=frozen.weights_hash(),
            layer=tower.layer,
            final_norm=tower.final_norm,
            width=frozen.width,
            pooled_width=frozen.pooled_width,
        )

    def _run(
        self, name: str, ids: NDArray[np.uint16]
    ) -> Iterator[tuple[NDArray[np.float16], NDArray[np.float16] | None]]:
        """Hidden states [L, D] and pooled [P] of each row, in order."""
        for start in range(0, len(ids), self._batch_size):
            tokens = ids[start : start + self._batch_size]
            for row, (hidden, pooled) in enumerate(self._encode(self._frozen[name], tokens)):
                if self._config.precision == "float32" or _finite(hidden, pooled):
                    yield hidden, pooled
                    continue
                if name not in self._float32:
                    tower = next(tower for tower in self._config.towers if tower.name == name)
                    self._float32[name] = self._load(tower, "float32")
                yield from self._encode(self._float32[name], tokens[row : row + 1])

    def _encode(
        self, tower: FrozenTower, ids: NDArray[np.uint16]
    ) -> Iterator[tuple[NDArray[np.float16], NDArray[np.float16] | None]]:
        with torch.cuda.stream(self._stream):  # no stream: no effect
            hidden, pooled = tower.encode(torch.from_numpy(ids.astype(np.int64)))
            stored = hidden.to(torch.float16).cpu().numpy()
            vectors = [None] * len(ids) if pooled is None else pooled.to(torch.float16).cpu().numpy()
        return zip(stored, vectors, strict=True)


def _finite(hidden: NDArray[np.float16], pooled: NDArray[np.float16] | None) -> bool:
    return bool(np.isfinite(hidden).all() and (pooled is None or np.isfinite(pooled).all()))
