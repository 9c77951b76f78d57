"""How well loaders shuffle, as two numbers.

`spread`: how far the samples of one source shard are spread over an epoch: the standard deviation of their places in
it, averaged over the shards, over what a uniformly random order gives; 1 = as well as can be, 0 = in one piece.
`together`: of the pairs of samples in one batch, the share that is of one source shard, over what a uniformly random
order gives; 1 = as chance has it, larger = shards come in pieces.

Legend: N samples, m of them in a shard, b in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import MANIFEST
from pipeline.operate.bench.loader.ours import Work
from pipeline.operate.bench.loader.rivals import TUNED, Rivals
from pipeline.operate.bench.loader.samples import NUMBERS, write_latents, write_samples
from pipeline.storage import open_store


@dataclass(frozen=True)
class Quality:
    """See above."""

    spread: float
    together: float


def quality(batches: Sequence[Sequence[int]], shards: Sequence[int]) -> Quality:
    """The figures of one epoch.

    Args:
        batches: the numbers of the samples, 0 to N - 1, as they came.
        shards: how many samples each source shard has; they are numbered through.

    Raises:
        AssertionError: a sample did not come, or came twice.
    """
    order = np.concatenate([np.asarray(batch, np.int64) for batch in batches])
    count = sum(shards)
    if len(order) != count or not np.array_equal(np.sort(order), np.arange(count)):
        raise AssertionError(f"the epoch is no permutation of its {count} samples")
    shard_of = np.repeat(np.arange(len(shards)), shards)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    expected = np.sqrt(count * (count + 1) / 12)  # of places drawn without replacement, ddof = 1
    borders = np.cumsum(shards)[:-1]
    spreads = [np.std(part, ddof=1) / expected for part in np.split(place, borders) if len(part) > 1]
    pairs = same = 0
    for batch in batches:
        counts = np.bincount(shard_of[np.asarray(batch, np.int64)])
        same += int((counts * (counts - 1)).sum())
        pairs += len(batch) * (len(batch) - 1)
    sizes = np.asarray(shards, np.float64)
    by_chance = float((sizes * (sizes - 1)).sum()) / (count * (count - 1))
    return Quality(float(np.mean(spreads)), same / pairs / by_chance)


@dataclass(frozen=True)
class ShuffleSizes:
    """Many shards of few samples, not as many as a batch has; what is in memory is small against the whole."""

    shards: int = 100
    per_shard: int = 640
    block_samples: int = 16
    batch: int = 64
    window: int = 16

    @property
    def samples(self) -> int:
        """Of all shards."""
        return self.shards * self.per_shard

    @property
    def held(self) -> int:
        """The most that our loader has in memory: for each place in the batch a window, and the blocks at its ends."""
        return self.batch * (self.window + 2 * self.block_samples)


def measure_shuffle(sizes: ShuffleSizes, place: Path, rivals: Rivals, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of ours, of webdataset with a buffer of the same memory, and of the others as they come."""
    say(f"shuffling: {sizes.shards} shards of {sizes.per_shard} tiny samples")
    write_samples(place / "samples", NUMBERS, sizes.samples)
    store = open_store(str(place / "ours"))
    shards = [sizes.per_shard] * sizes.shards
    write_latents(place / "samples", store, NUMBERS, per_shard=sizes.per_shard, block_samples=sizes.block_samples)
    work = Work(str(place / "ours" / MANIFEST), sizes.samples, batch=sizes.batch, window=sizes.window)
    with rivals.ours(work) as ours:
        found = {"ours": quality(ours.ask("order")["batches"], shards)}
    for name in rivals.pythons:
        if name in (*TUNED, "torch_files"):  # shuffled as without it; shuffled as a whole
            continue
        more = {"per_shard": sizes.per_shard, "shuffle_buffer": sizes.held, "batch": sizes.batch}
        with rivals.peer(name, samples=str(place / "samples"), place=str(place / name), **more) as peer:
            its_shards = peer.ask("write")["shards"]
            found[name] = quality(peer.ask("order")["batches"], its_shards)
    return {"held_samples": sizes.held, **{name: asdict(one) for name, one in found.items()}}
