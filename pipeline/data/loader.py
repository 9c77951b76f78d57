"""Latent shards to training batches: the same global batches at any world size, from any step.

Legend: b samples of this rank, C latent channels, h and w sides of the latent, L tokens of a caption.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import storage
from pipeline.data.blocks import BlockReader, LatentSample, LruCache, ShardPlan
from pipeline.data.manifest import Block, Split, key_hash, load_manifest
from pipeline.data.order import Integers, Order, rank_positions
from pipeline.randomness import Purpose, uniform

_BATCHES_AHEAD = 3
_REQUESTS_AT_ONCE = 8
_PLANS_CACHED = 1024  # shards, a few kB each


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch, in host memory."""

    step: int
    epoch: int  # in which the global batch begins; the same on all ranks
    positions: Tensor  # int64 [b], places in the global batch
    moments: Tensor  # float16 [b, 2C, h, w]: the posterior's mean and log-variance
    tokens: Tensor  # int64 [b, L], of the caption drawn for the epoch
    keys: list[str]


class LatentLoader:
    """An endless iterator over this rank's batches, read ahead by a thread. Close it, or use it as a context.

    Memory is bounded by the window: a rank keeps its b windows, the blocks at their ends and those under way, at most
    b * (window + 3 blocks) samples, and what was read ahead. Iterating raises DataError for a damaged block and
    StorageError for one that cannot be read; then the loader is closed.

    Args:
        manifest_url: of the latents.
        global_batch: samples per step over all ranks.
        seed: of the run.
        window: samples that are shuffled together within each run of an epoch (see `order`).
        rank: this process among all.
        world_size: number of processes; must divide the global batch.
        start_step: the first step to yield: `state_dict()["step"]` of the run that is resumed.
        split: which samples.

    Raises:
        ConfigError: the world size does not divide the global batch.
        DataError: the manifest cannot be used, has no sample of the split, or is of latents that `BlockReader` refuses.
        StorageError: the manifest cannot be read.
    """

    def __init__(
        self,
        manifest_url: str,
        *,
        global_batch: int,
        seed: int,
        window: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        split: Split = "train",
    ) -> None:
        self.manifest = load_manifest(manifest_url)
        self._seed = seed
        self._positions = rank_positions(global_batch, rank, world_size)
        sizes = [shard.samples(split) for shard in self.manifest.shards]
        self._order = Order([sizes], global_batch=global_batch, seed=seed, window=window)
        self._reader = BlockReader(storage.open_store(storage.split(manifest_url)[0]), self.manifest, split)
        self._plans = LruCache[int, ShardPlan](_PLANS_CACHED, lambda plan: 1)
        self._blocks = LruCache[tuple[int, int], list[LatentSample]](0, len)
        self._largest_block = 0
        self._step = self._submitted = start_step
        self._ahead: deque[Future[Batch]] = deque()
        self._assembler = ThreadPoolExecutor(1, "latent-batches")
        self._requests = ThreadPoolExecutor(_REQUESTS_AT_ONCE, "latent-blocks")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            while len(self._ahead) <= _BATCHES_AHEAD:
                self._ahead.append(self._assembler.submit(self._assemble, self._submitted))
                self._submitted += 1
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where to resume: the step that comes next. What was read ahead does not count."""
        return {"step": self._step}

    @property
    def cached_samples(self) -> int:
        """Samples in memory, batches read ahead not counted."""
        return self._blocks.weight

    def close(self) -> None:
        """Stop the threads, after the requests that are under way. May be called twice."""
        self._assembler.shutdown(wait=False, cancel_futures=True)
        self._requests.shutdown(wait=False, cancel_futures=True)
        self._assembler.shutdown()
        self._requests.shutdown()

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _assemble(self, step: int) -> Batch:
        places = self._order.batch(step, self._positions)
        samples = self._samples(places.shard, places.sample)
        chosen = _choose_captions(self._seed, places.epoch, samples)
        tokens = np.stack([sample.tokens[i] for sample, i in zip(samples, chosen, strict=True)])
        return Batch(
            step=step,
            epoch=places.first_epoch,
            positions=torch.from_numpy(self._positions),
            moments=torch.from_numpy(np.stack([sample.moments for sample in samples])),
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            keys=[sample.key for sample in samples],
        )

    def _samples(self, shards: Integers, numbers: Integers) -> list[LatentSample]:
        plans = self._plans.get(shards.tolist(), self._reader.plan, self._requests)
        self._plans.trim()

        def fetch(place: tuple[int, int]) -> list[LatentSample]:
            shard, block = place
            return self._reader.block(shard, plans[shard].blocks[block])

        places, rows = [], []
        for shard, number in zip(shards.tolist(), numbers.tolist(), strict=True):
            block, row = plans[shard].locate(number)
            places.append((shard, block))
            rows.append(row)
        blocks = self._blocks.get(places, fetch, self._requests)
        self._largest_block = max(self._largest_block, *(len(block) for block in blocks.values()))
        # a window reaches at most one block, less a sample, over each of its ends
        reach = self._order.streams[0].span + 2 * self._largest_block
        self._blocks.capacity = len(self._positions) * reach
        self._blocks.trim()
        return [blocks[place][row] for place, row in zip(places, rows, strict=True)]


@dataclass(frozen=True)
class SplitArrays:
    """Samples of a split in manifest order, each with its first caption."""

    moments: NDArray[np.float16]  # [N, 2C, h, w]
    tokens: NDArray[np.uint16]  # [N, L]
    keys: list[str]
    captions: list[str]


def read_split(manifest_url: str, split: Split, limit: int | None = None) -> SplitArrays:
    """The samples of a split, all in memory; none where the manifest has none.

    Args:
        manifest_url: of the latents.
        split: "train" or "holdout".
        limit: only so many, the first ones; None = all.

    Raises:
        DataError: manifest, receipt or a block cannot be used, or `BlockReader` refuses the latents.
        StorageError: one of them cannot be read.
    """
    manifest = load_manifest(manifest_url)
    reader = BlockReader(storage.open_store(storage.split(manifest_url)[0]), manifest, split)
    left = manifest.samples(split) if limit is None else min(limit, manifest.samples(split))
    wanted: list[tuple[int, Block]] = []
    for shard, entry in enumerate(manifest.shards):
        if left > 0 and entry.samples(split):
            plan = reader.plan(shard)
            wanted += [(shard, b) for b, start in zip(plan.blocks, plan.starts, strict=True) if start < left]
            left -= entry.samples(split)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        samples = [sample for block in pool.map(lambda at: reader.block(*at), wanted) for sample in block][:limit]
    side = manifest.latent_side
    moments = np.empty((len(samples), 2 * manifest.latent_channels, side, side), np.float16)
    tokens = np.empty((len(samples), manifest.context_length), np.uint16)
    for row, sample in enumerate(samples):
        moments[row], tokens[row] = sample.moments, sample.tokens[0]
    return SplitArrays(moments, tokens, [s.key for s in samples], [s.captions()[0] for s in samples])


def _choose_captions(seed: int, epochs: Integers, samples: list[LatentSample]) -> list[int]:
    """One caption for each sample, drawn by (seed, epoch, key)."""
    counts = [len(sample.tokens) for sample in samples]
    if max(counts) == 1:
        return [0] * len(samples)
    keys = torch.tensor([key_hash(sample.key) >> 1 for sample in samples])  # 63 bits, as int64 has no more
    drawn = torch.empty(len(samples), dtype=torch.float64)
    for epoch in np.unique(epochs).tolist():
        here = torch.from_numpy(epochs == epoch)
        drawn[here] = uniform(seed, Purpose.CAPTION_CHOICE, epoch, keys[here], ()).double()
    return (drawn * torch.tensor(counts)).long().tolist()
