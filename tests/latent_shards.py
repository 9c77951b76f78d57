"""Latent data sets of any shape without pictures: buckets, towers, captions, mirrored latents, all told by the key."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support import fingerprint as mark_of
from support import provenance

from pipeline.data.fold import fold
from pipeline.data.manifest import EMPTY_PREFIX, MANIFEST, RECEIPT_SUFFIX, Bucket, Fingerprint, Receipt
from pipeline.data.tar import npy_bytes
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity, Text

CHANNELS, SIDE, LENGTH, BLOCK, FACTOR = 2, 2, 4, 8, 2
FINGERPRINT = mark_of(resolution=SIDE * FACTOR, context_length=LENGTH)
Sizes = Mapping[Bucket, tuple[int, int]] | tuple[int, int]
"""Of a shard: training and hold-out samples of each picture size, or of its one size."""


def key(shard: int, number: int, prefix: str = "") -> str:
    return f"{prefix}{shard:05d}/{number:04d}"


def random_of(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def moments(name: str, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """float16 [2C, height, width] of the sample with this key."""
    return random_of(name).standard_normal((2 * CHANNELS, height, width)).astype(np.float16)


def text(name: str, number: int, mark: Fingerprint) -> Text:
    """A caption as its towers have it; the first value of each array but `pooled` is the caption's number."""
    rng, arrays = random_of(f"{name} {number}"), Text()
    for tower in mark.text_towers:
        length = tower.context_length
        if mark.text_mode != "cached":
            arrays[f"tokens.{tower.name}"] = rng.integers(0, 65536, length).astype(np.uint16)
        else:
            length = int(rng.integers(1, length + 1)) if mark.text_padding == "trimmed" else length
            arrays[f"text.{tower.name}"] = rng.standard_normal((length, tower.width)).astype(np.float16)
        next(reversed(arrays.values())).flat[:1] = number
        if tower.pooled_width:
            arrays[f"pooled.{tower.name}"] = rng.standard_normal(tower.pooled_width).astype(np.float16)
    return arrays


def sample(name: str, bucket: Bucket, mark: Fingerprint, captions: int, side: int | None = None) -> EncodedSample:
    height, width = (side, side) if side else (bucket[0] // FACTOR, bucket[1] // FACTOR)
    latent = moments(name, height, width)
    return EncodedSample(
        key=name,
        captions=tuple(f"{name} {i}" for i in range(captions)),
        bucket=bucket,
        moments=latent,
        flipped=latent[..., ::-1] if mark.flip else None,
        text=tuple(text(name, i, mark) for i in range(captions)),
        size=np.array([*bucket, 0, 0, *bucket], np.int32),
    )


def write_shard(
    folder: Path,
    shard: int,
    sizes: Sizes,
    *,
    captions: int = 1,
    side: int | None = None,
    mark: Fingerprint = FINGERPRINT,
    prefix: str = "",
) -> Receipt:
    """One shard and its receipt; keys count through its buckets, training samples first in each."""
    by_bucket = dict(sizes) if isinstance(sizes, Mapping) else {mark.buckets[0]: sizes}
    data, receipt = _made(shard, tuple(sorted(by_bucket.items())), captions, side, mark, prefix)
    (folder / receipt.shard).write_bytes(data)
    (folder / (receipt.shard + RECEIPT_SUFFIX)).write_bytes(receipt.to_bytes())
    return receipt


@functools.lru_cache(32)  # many tests read, copy or damage the same one
def _made(
    shard: int,
    sizes: tuple[tuple[Bucket, tuple[int, int]], ...],
    captions: int,
    side: int | None,
    mark: Fingerprint,
    prefix: str,
) -> tuple[memoryview, Receipt]:
    name = f"{shard:05d}.tar"
    latents, number = LatentShard(name, CHANNELS, BLOCK), 0
    for bucket, (train, holdout) in sizes:
        for i in range(train + holdout):
            latents.add(sample(key(shard, number, prefix), bucket, mark, captions, side), holdout=i >= train)
            number += 1
    return latents.finish(name, SourceIdentity(name, 0, ""), mark.digest(), {})


def write_latents(
    folder: Path,
    sizes: Sequence[Sizes],
    *,
    captions: int = 1,
    side: int | None = None,
    fingerprint: Fingerprint = FINGERPRINT,
    prefix: str = "",
    **about: Any,
) -> str:
    """A data set of shards 00000.tar, ...; returns the manifest's address.

    Args:
        folder: where; made if it is not there.
        sizes: of each shard.
        captions: of each sample.
        side: of all latents, another than the bucket's, as damaged data have it.
        fingerprint: tells buckets, towers, text mode, and whether there are mirrored latents.
        prefix: of all keys.
        about: of `fold.Provenance`, such as scaling_factor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    receipts = [
        write_shard(folder, shard, one, captions=captions, side=side, mark=fingerprint, prefix=prefix)
        for shard, one in enumerate(sizes)
    ]
    for stem, values in text("the empty prompt", 0, fingerprint).items():
        (folder / f"{EMPTY_PREFIX}{stem}.npy").write_bytes(npy_bytes(values))
    told = {"fingerprint": fingerprint, "latent_channels": CHANNELS, "downsampling_factor": FACTOR, **about}
    (folder / MANIFEST).write_bytes(fold(receipts, provenance(**told)).to_bytes())
    return str(folder / MANIFEST)
