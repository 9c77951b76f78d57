"""All pictures of some image shards as pixels in memory, training and held-out ones apart."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ImagesConfig
from pipeline.data import images
from pipeline.data.samples import ImageSample, is_holdout, read_image_shard
from pipeline.errors import DataError
from pipeline.storage import find_shards, read_file

MEMORY_LIMIT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Pictures:
    """Pixels uint8 [N, side, side, 3], in the order of the shards.

    Args:
        train: to train on, at least one.
        holdout: never to train on; may be none.
        rejected: samples that could not be used.
        digest: SHA-256 of all pixels, to know the same pictures again.
    """

    train: NDArray[np.uint8]
    holdout: NDArray[np.uint8]
    rejected: int
    digest: str


def read_pictures(config: ImagesConfig, limit_bytes: int = MEMORY_LIMIT_BYTES) -> Pictures:
    """Read, decode and crop every picture.

    Raises:
        DataError: no shard, no picture to train on, or more pixels than `limit_bytes`.
        StorageError: a shard cannot be read.
    """
    parts: dict[bool, list[NDArray[np.uint8]]] = {False: [], True: []}
    digest, rejected, size = hashlib.sha256(), 0, 0
    for key, pixels in _pixels(config):
        if pixels is None:
            rejected += 1
            continue
        held_out = is_holdout(key, config.holdout)
        parts[held_out].append(pixels)
        digest.update(b"holdout" if held_out else b"train")
        digest.update(pixels.data)
        size += pixels.nbytes
        if size > limit_bytes:
            raise DataError(
                f"images.shards: more than {limit_bytes / 2**30:.0f} GiB of pixels at {config.resolution} px",
                "train the autoencoder on a part of the shards: images.shards=.../{000..099}.tar",
            )
    if not parts[False]:
        raise DataError(
            f"images.shards: no picture to train on ({rejected} rejected, {len(parts[True])} held out)",
            "look at the image shards, and at images.holdout",
        )
    none = np.empty((0, config.resolution, config.resolution, 3), np.uint8)
    held = np.stack(parts[True]) if parts[True] else none
    return Pictures(np.stack(parts[False]), held, rejected, digest.hexdigest())


def _pixels(config: ImagesConfig) -> Iterator[tuple[str, NDArray[np.uint8] | None]]:
    for shard in find_shards(config.shards):
        for sample in read_image_shard(io.BytesIO(read_file(shard)), config.caption_field):
            pixels = None
            if isinstance(sample, ImageSample):
                try:
                    whole = images.decode(sample.image_bytes, config.background)
                    pixels = np.ascontiguousarray(images.cover(whole, (config.resolution,) * 2))
                except images.ImageError:
                    pixels = None
            yield sample.key, pixels
