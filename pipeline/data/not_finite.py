"""Samples of a batch whose latents are not finite, by name: data set, shard, key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets

MENDED = "names all such samples: encode their shards anew, or take them down with `lathe remove`"
"""What `lathe verify` is good for then."""
_NAMED = 3  # in a message


class SampleName(NamedTuple):
    """Where a sample is."""

    dataset: str  # its address
    shard: str
    key: str


def not_finite(batch: Batch, datasets: DataSets) -> list[SampleName]:
    """Which samples of a batch they are; on a GPU it waits for them."""
    bad = ~batch.moments.isfinite().flatten(1).all(1)
    found = []
    for place in bad.nonzero().flatten().tolist():
        dataset, shard = int(batch.datasets[place]), int(batch.shards[place])
        name = datasets.manifests[dataset].shards[shard].name
        found.append(SampleName(datasets.stores[dataset].url, name, batch.keys[place]))
    return found


def listed(samples: Sequence[SampleName]) -> str:
    """A few of them: `0012 in 00000.tar, 0033 in 00001.tar and 5 more of s3://bucket/latents`."""
    unique = list(dict.fromkeys(samples))
    named = ", ".join(f"{sample.key} in {sample.shard}" for sample in unique[:_NAMED])
    more = f" and {len(unique) - _NAMED} more" if len(unique) > _NAMED else ""
    return f"{named}{more} of {', '.join(sorted({sample.dataset for sample in unique}))}"
