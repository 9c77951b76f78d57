"""All samples of a split in memory, for commands that look at them as a whole.

Legend: N samples, C latent channels, h and w sides of the latent.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.gather import gather
from pipeline.data.latent_block import parse_block
from pipeline.data.layout import Layout
from pipeline.data.manifest import Manifest, Split, load_manifest
from pipeline.data.shard_plan import ShardPlan, load_plans
from pipeline.storage import Store

_REQUESTS_AT_ONCE = 8


@dataclass(frozen=True)
class SplitArrays:
    """Samples of a split in manifest order, each with its first caption."""

    moments: NDArray[np.float16]  # [N, 2C, h, w]
    keys: list[str]
    captions: list[str]


def read_split(manifest_url: str, split: Split, limit: int | None = None) -> SplitArrays:
    """The samples of a split, all in memory; none where the manifest has none.

    Args:
        manifest_url: of the latents, which must be of one, square shape.
        split: "train" or "holdout".
        limit: only so many, the first ones; None = all.

    Raises:
        DataError: manifest, receipt or a block cannot be used, or the latents are others than those.
        StorageError: one of them cannot be read.
    """
    manifest = load_manifest(manifest_url)
    layout = _layout(manifest)
    store = storage.open_store(storage.split(manifest_url)[0])
    count = left = manifest.samples(split) if limit is None else min(limit, manifest.samples(split))
    wanted: list[tuple[str, ShardPlan, int]] = []
    for shard, entry in enumerate(manifest.shards):
        if left > 0 and entry.samples(split):
            (plan,) = load_plans(store, manifest, shard, split).values()
            wanted += [(entry.name, plan, block) for block, start in enumerate(plan.starts.tolist()) if start < left]
            left -= entry.samples(split)
    moments = np.empty((count, *layout.moments), np.float16)
    found = SplitArrays(moments, [], [])
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for part in pool.map(lambda place: _read_block(store, layout, *place), wanted):
            first, end = len(found.keys), min(len(found.keys) + len(part.keys), count)
            moments[first:end] = part.moments[: end - first]
            found.keys.extend(part.keys[: end - first])
            found.captions.extend(part.captions[: end - first])
    return found


def _layout(manifest: Manifest) -> Layout:
    """The layout of square latents. Raises DataError for others."""
    side = manifest.latent_side * manifest.downsampling_factor
    return Layout.of(manifest, (side, side), flip=False)


def _read_block(store: Store, layout: Layout, name: str, plan: ShardPlan, number: int) -> SplitArrays:
    start = int(plan.offset[number])
    data = store.read(name, start, start + int(plan.length[number]))
    block = parse_block(data, plan, number, layout, f"{store.url.rstrip('/')}/{name}")
    rows = range(len(block))
    wordless = replace(layout, text=())  # their captions' arrays are not asked for
    arrays = gather([(block, row) for row in rows], [0 for _ in rows], [False for _ in rows], wordless)
    return SplitArrays(
        moments=arrays.moments.numpy(),
        keys=block.keys,
        captions=[block.caption_texts(row)[0] for row in rows],
    )
