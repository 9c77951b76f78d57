"""Where in a latent shard the samples of one bucket and split are, by its receipt, in few bytes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.manifest import Block, Bucket, Manifest, Range, ShardEntry, Split, load_receipt
from pipeline.data.order import Integers
from pipeline.data.tar_header import BLOCK
from pipeline.errors import DataError
from pipeline.storage import Store


@dataclass(frozen=True)
class ShardPlan:
    """The n blocks of one shard that hold a bucket's samples of a split, which are a range of the shard's samples."""

    first: int  # sample of the shard with which the range begins
    numbers: Integers  # [n] of each block in the receipt
    starts: Integers  # [n] samples of the range before each block
    samples: Integers  # [n]
    offset: Integers  # [n] bytes from the start of the tar
    length: Integers  # [n] bytes
    crc32: Integers  # [n]

    def locate(self, sample: int) -> tuple[int, int]:
        """The block (counted here) that holds a sample of the range, and its place in the block."""
        block = bisect_right(self._starts, sample) - 1
        return block, sample - self._starts[block]

    @cached_property
    def _starts(self) -> list[int]:
        """`starts`, for lookups one by one, which arrays are slow at."""
        starts: list[int] = self.starts.tolist()
        return starts

    def place(self, block: int) -> str:
        """Which samples and bytes of the shard a block has, in words."""
        first, offset = self.first + int(self.starts[block]), int(self.offset[block])
        last, end = first + int(self.samples[block]) - 1, offset + int(self.length[block]) - 1
        return f"samples {first} to {last} (bytes {offset} to {end})"


def load_plans(store: Store, manifest: Manifest, shard: int, split: Split) -> dict[Bucket, ShardPlan]:
    """The plans of a shard, one for each bucket that has samples of the split.

    Args:
        store: the manifest's folder.
        manifest: of the data set.
        shard: its number in the manifest.
        split: "train" or "holdout".

    Raises:
        DataError: the receipt is damaged, or not the one that the manifest was made from.
        StorageError: it cannot be read.
    """
    entry = manifest.shards[shard]
    receipt = load_receipt(store, entry.receipt)
    counts = [(count.bucket, getattr(count, split)) for count in entry.buckets if getattr(count, split)]
    ranges = [(one.bucket, getattr(one, split)) for one in receipt.buckets]
    ranges = [(bucket, (first, end)) for bucket, (first, end) in ranges if end > first]
    plans = {bucket: _plan(receipt.blocks, samples, entry.bytes) for bucket, samples in ranges}
    usable = {bucket: plan for bucket, plan in plans.items() if plan is not None}
    same = (receipt.sha256, receipt.fingerprint) == (entry.sha256, manifest.fingerprint.digest())
    same = same and [(bucket, end - first) for bucket, (first, end) in ranges] == counts
    if not same or len(usable) < len(counts):
        raise wrong_receipt(store, entry)
    return usable


def wrong_receipt(store: Store, entry: ShardEntry) -> DataError:
    """What is raised for a receipt that does not fit its entry in the manifest."""
    return DataError(
        f"{store.url.rstrip('/')}/{entry.name}: its receipt is not the one the manifest was made from",
        "run `lathe encode` again, which makes the manifest anew",
    )


def _plan(blocks: tuple[Block, ...], samples: Range, shard_bytes: int) -> ShardPlan | None:
    """The plan of a range; None where the blocks do not make it up, or leave the shard."""
    first, end = samples
    rows = [
        (number, block.first_sample - first, block.samples, block.offset, block.length, block.crc32)
        for number, block in enumerate(blocks)
        if first <= block.first_sample < end
    ]
    before = 0
    for _, start, count, offset, length, crc32 in rows:
        room = offset + length <= shard_bytes < 1 << 63 and count * BLOCK <= length
        if start != before or not count or not room or not 0 <= crc32 < 1 << 32:
            return None
        before += count
    if before != end - first:
        return None
    return ShardPlan(first, *np.array(rows, np.int64).T.copy())
