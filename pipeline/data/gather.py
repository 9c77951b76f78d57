"""Samples of blocks to the arrays of a batch.

Legend: b samples, C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding, P
width of a pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import TowerText
from pipeline.data.latent_block import LatentBlock
from pipeline.data.layout import FIXED_COLUMNS, MIRRORED, MOMENTS, SIZE, ArrayLayout, Layout

_Row = tuple[LatentBlock, int] | None

_FIELDS = {"tokens": "tokens", "text": "embeddings", "pooled": "pooled"}  # of TowerText


@dataclass(frozen=True)
class Arrays:
    """What a batch holds of its samples."""

    moments: Tensor  # float16 [b, 2C, h, w]
    text: dict[str, TowerText]  # by tower
    size: Tensor  # int32 [b, 6]


def gather(rows: Sequence[_Row], captions: Sequence[int], mirrored: Sequence[bool], layout: Layout) -> Arrays:
    """Copy samples together.

    Args:
        rows: of each sample, its block and its place there; None gives zeros, and a mask without a token.
        captions: which one of each sample; of no account where there is no sample.
        mirrored: whether to take the mirrored latent.
        layout: of all blocks.

    Raises:
        IndexError: a sample has no such caption, or no mirrored latent.
    """
    if any(captions) or any(mirrored):  # every sample has a first caption
        for row, caption, flip in zip(rows, captions, mirrored, strict=True):
            if row is not None and not (0 <= caption < row[0].counts[row[1]] and (row[0].mirrored or not flip)):
                raise IndexError(f"{row[0].keys[row[1]]!r} has no caption {caption}, or no mirrored latent")
    moments = _copy(rows, [MIRRORED if flip else MOMENTS for flip in mirrored], layout.fixed[MOMENTS])
    text: dict[str, dict[str, Tensor]] = {}
    for number, one in enumerate(layout.text):
        columns = [FIXED_COLUMNS + len(layout.text) * caption + number for caption in captions]
        found, arrays = _copy(rows, columns, one.array), text.setdefault(one.tower, {})
        arrays[_FIELDS[one.kind]] = found.long() if one.kind == "tokens" else found
        if one.array.trimmed:
            arrays["mask"] = _mask(rows, columns, one.array.shape[0])
    size = _copy(rows, [SIZE] * len(rows), layout.fixed[SIZE])
    return Arrays(moments, {tower: TowerText(**arrays) for tower, arrays in text.items()}, size)


def _copy(rows: Sequence[_Row], columns: Sequence[int], array: ArrayLayout) -> Tensor:
    """One array of each sample, [b, ...], zeros beyond what it has."""
    token = np.dtype(array.dtype).itemsize * prod(array.shape[1:])
    step, begin = token * array.shape[0], 0
    make = np.zeros if array.trimmed or None in rows else np.empty
    found = make((len(rows), *array.shape), array.dtype)
    # As plain bytes: of a few kB at a time, numpy's own assignment takes longer to prepare than to copy.
    target = found.reshape(-1).view(np.uint8).data
    for row, column in zip(rows, columns, strict=True):
        if row is not None:
            block, number = row
            cell = number * block.width + column
            start = block.starts[cell]
            length = token * block.tokens[cell] if array.trimmed and block.tokens else step
            target[begin : begin + length] = block.data[start : start + length]
        begin += step
    return torch.from_numpy(found)


def _mask(rows: Sequence[_Row], columns: Sequence[int], context_length: int) -> Tensor:
    """Which tokens of a trimmed embedding there are, [b, L]."""
    tokens = [
        0 if row is None or row[0].tokens is None else row[0].tokens[row[1] * row[0].width + column]
        for row, column in zip(rows, columns, strict=True)
    ]
    return torch.arange(context_length) < torch.tensor(tokens)[:, None]
