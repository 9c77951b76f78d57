"""Held-out samples in memory: read once, shared out to the ranks, in as many batches on each.

Legend: b samples of a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.gather import gather
from pipeline.data.latent_block import LatentBlock, parse_block
from pipeline.data.layout import Layout
from pipeline.data.manifest import Bucket, Manifest
from pipeline.data.not_finite import MENDED, listed, not_finite
from pipeline.data.shard_plan import load_plans
from pipeline.errors import ConfigError, DataError

_REQUESTS_AT_ONCE = 8
_Row = tuple[LatentBlock, int] | None


class Place(NamedTuple):
    """Where a held-out sample is."""

    position: int  # among those that are read, over all data sets
    dataset: int
    shard: int
    number: int  # in the shard's held-out range of its bucket


def places(manifests: Sequence[Manifest], limit: int) -> dict[Bucket, list[Place]]:
    """Which samples are read: spread evenly over the data sets as they are listed, or all where there are no more.

    Args:
        manifests: of the data sets.
        limit: so many at most.

    Raises:
        ConfigError: none is held out.
    """
    there = sum(manifest.samples("holdout") for manifest in manifests)
    if not there:
        raise ConfigError(
            "validation.every: set, but no sample of the latents is held out",
            "encode with images.holdout above 0, to another output; or set validation.every=null",
        )
    count, index, before = min(limit, there), 0, 0
    found: dict[Bucket, list[Place]] = defaultdict(list)
    for dataset, manifest in enumerate(manifests):
        for shard, entry in enumerate(manifest.shards):
            for here in entry.buckets:
                while index < count and index * there // count < before + here.holdout:
                    found[here.bucket].append(Place(index, dataset, shard, index * there // count - before))
                    index += 1
                before += here.holdout
    return dict(found)


def read_held_out(datasets: DataSets, limit: int, *, rank: int, world_size: int, batch_size: int) -> list[Batch]:
    """This rank's part, by its first captions and without mirroring.

    `positions` are the samples' indices among all that are read. Every rank has as many batches of the same shapes;
    what is missing has weight 0.

    Args:
        datasets: of either split; what is held out is whole whatever share and keys say.
        limit: samples over all ranks, at most.
        rank: this one.
        world_size: how many share them.
        batch_size: b, at most.

    Raises:
        ConfigError: none is held out.
        DataError, StorageError: a receipt or block is damaged or cannot be read; or latents are not finite.
    """
    batches: list[Batch] = []
    for bucket, found in sorted(places(datasets.manifests, limit).items()):
        share = -(-len(found) // world_size)
        mine = found[rank * share : (rank + 1) * share]
        layout = Layout.of(datasets.manifests[0], bucket, flip=False)
        rows: list[tuple[Place | None, _Row]] = list(zip(mine, _read(datasets, bucket, mine, layout), strict=True))
        rows += [(None, None)] * (share - len(mine))
        parts = (rows[first : first + batch_size] for first in range(0, share, batch_size))
        batches += [_batch(bucket, part, layout) for part in parts]
    if broken := [sample for batch in batches for sample in not_finite(batch, datasets)]:
        raise DataError(
            f"held-out latents are not finite: {listed(broken)}",
            f"`lathe verify {broken[0].dataset}` {MENDED}; or set validation.every=null",
        )
    return batches


def _read(datasets: DataSets, bucket: Bucket, wanted: Iterable[Place], layout: Layout) -> list[_Row]:
    """Block and place of each sample; those of a shard stand together."""
    shards = [list(group) for _, group in groupby(wanted, lambda place: place[1:3])]

    def read(group: list[Place]) -> list[_Row]:
        _, dataset, shard, _ = group[0]
        manifest, store = datasets.manifests[dataset], datasets.stores[dataset]
        plan, name = load_plans(store, manifest, shard, "holdout")[bucket], manifest.shards[shard].name
        blocks: dict[int, LatentBlock] = {}
        rows: list[_Row] = []
        for place in group:
            number, row = plan.locate(place.number)
            if number not in blocks:
                start = int(plan.offset[number])
                data = store.read(name, start, start + int(plan.length[number]))
                blocks[number] = parse_block(data, plan, number, layout, f"{store.url.rstrip('/')}/{name}")
            rows.append((blocks[number], row))
        return rows

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "held-out") as pool:
        return [row for rows in pool.map(read, shards) for row in rows]


def _batch(bucket: Bucket, rows: Sequence[tuple[Place | None, _Row]], layout: Layout) -> Batch:
    blocks, zeros = [row for _, row in rows], [0] * len(rows)
    arrays = gather(blocks, zeros, [False] * len(rows), layout)
    return Batch(
        step=0,
        bucket=bucket,
        positions=torch.tensor([0 if place is None else place.position for place, _ in rows]),
        epochs=torch.tensor(zeros),
        datasets=torch.tensor([0 if place is None else place.dataset for place, _ in rows]),
        shards=np.array([0 if place is None else place.shard for place, _ in rows]),
        moments=arrays.moments,
        text=arrays.text,
        size=arrays.size,
        weight=torch.tensor([float(place is not None) for place, _ in rows]),
        mirrored=torch.zeros(len(rows), dtype=torch.bool),
        keys=["" if row is None else row[0].keys[row[1]] for row in blocks],
        captions=zeros,
    )
