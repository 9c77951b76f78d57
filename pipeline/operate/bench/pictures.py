"""Image shards for benchmarks: JPEGs of smooth noise with some grain, about as hard to decode as photographs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.data import images
from pipeline.data.tar import TarBuilder
from pipeline.storage import Store


def write_shards(store: Store, shards: int, per_shard: int, side: int, distinct: int = 64) -> int:
    """Write `00000.tar`, ...: KEY.jpg of side x side pixels and KEY.txt.

    Args:
        store: where to.
        shards: how many.
        per_shard: pictures in each.
        side: of each picture, in pixels.
        distinct: pictures that differ; they repeat after so many.

    Returns:
        Bytes written.
    """
    pictures = list(_pictures(distinct, side))
    written = 0
    for shard in range(shards):
        tar = TarBuilder()
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            tar.add(f"{number:09d}.jpg", pictures[number % distinct])
            tar.add(f"{number:09d}.txt", f"picture number {number} of a benchmark".encode())
        data = tar.finish()
        store.write(f"{shard:05d}.tar", data)
        written += len(data)
    return written


def _pictures(count: int, side: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse: NDArray[np.uint8] = rng.integers(0, 256, (max(2, side // 32),) * 2 + (3,), dtype=np.uint8)
        smooth = images.cover(coarse, (side, side)).astype(np.int16)
        grain = rng.normal(0, 6, smooth.shape)
        yield images.jpeg((smooth + grain).clip(0, 255).astype(np.uint8), quality=90)
