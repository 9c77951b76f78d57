"""A rank's part of one global batch.

Legend: b samples of this rank, C latent channels, h and w sides of the latent, L tokens of a caption, D width of its
embedding, P width of a pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.data.manifest import Bucket
from pipeline.data.order import Integers

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TowerText:
    """What one text tower is given, or gave: token ids, or embeddings."""

    tokens: Tensor | None = None  # int64 [b, L]
    embeddings: Tensor | None = None  # float16 [b, L, D], zero beyond the mask
    pooled: Tensor | None = None  # float16 [b, P]
    mask: Tensor | None = None  # bool [b, L], True = token; None where padding is stored

    def with_all(self, change: Change) -> TowerText:
        """A copy with all tensors changed."""
        tensors = (self.tokens, self.embeddings, self.pooled, self.mask)
        return TowerText(*(None if tensor is None else change(tensor) for tensor in tensors))


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch: all of one picture size."""

    step: int
    bucket: Bucket  # height, width in pixels
    positions: Tensor  # int64 [b], places in the global batch
    epochs: Tensor  # int64 [b], each sample's epoch of its stream
    datasets: Tensor  # int64 [b]
    shards: Integers  # int64 [b], numbers in the data sets' manifests
    moments: Tensor  # float16 [b, 2C, h, w]: the posterior's mean and log-variance
    text: dict[str, TowerText]  # by tower
    size: Tensor  # int32 [b, 6], see images.size_record
    weight: Tensor  # float32 [b]: 0 where the sample was skipped and its arrays are zeros, else 1
    mirrored: Tensor  # bool [b]
    keys: list[str]  # "" where skipped
    captions: list[int]  # number of the caption that was drawn

    def to(self, device: torch.device | str) -> Batch:
        """On a device; from pinned memory, the copy is only enqueued."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a GPU copies by itself."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Change) -> Batch:
        text = {name: tower.with_all(change) for name, tower in self.text.items()}
        tensors = {
            name: change(getattr(self, name))
            for name in ("positions", "epochs", "datasets", "moments", "size", "weight", "mirrored")
        }
        return replace(self, **tensors, text=text)  # type: ignore[arg-type]
