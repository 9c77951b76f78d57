"""Blocks from the store, or from the local cache: read in few requests, checked, read again once, skipped by option."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

from pipeline.config import LoaderConfig
from pipeline.data.cache import BlockCache, block_name
from pipeline.data.datasets import DataSets
from pipeline.data.latent_block import LatentBlock, parse_block
from pipeline.data.layout import Layout
from pipeline.data.manifest import Bucket
from pipeline.data.shard_plan import ShardPlan, load_plans
from pipeline.errors import DataError, LatheError, StorageError

_log = logging.getLogger(__name__)

WHOLE_SHARD = -1
Skip = tuple[int, int, int]
"""Data set, shard, and the block's number in the receipt; `WHOLE_SHARD` where its receipt cannot be used."""
Plans = Mapping[Bucket, ShardPlan]

_Result = TypeVar("_Result")


class Pending(Generic[_Result]):
    """Work that a pool does in time, or without one the first thread that asks for its result."""

    def __init__(self, work: Callable[[], _Result], pool: ThreadPoolExecutor | None) -> None:
        self._work: Callable[[], _Result] | None = work if pool is None else None
        self._future: Future[_Result] = Future() if pool is None else pool.submit(work)

    def result(self) -> _Result:
        """The result, waited for. Raises what the work raised."""
        if self._work is not None:
            work, self._work = self._work, None
            try:
                self._future.set_result(work())
            except BaseException as error:
                self._future.set_exception(error)
        return self._future.result()


class SkipList:
    """Blocks whose samples do not count, and how many samples they are; safe in threads.

    Args:
        config: whether blocks may be skipped, and how many.
        samples: of all streams.
        world_size: ranks that share them.
        known: skipped before, by this run.
    """

    def __init__(self, config: LoaderConfig, samples: int, world_size: int, known: Iterable[Skip]) -> None:
        self._config, self._samples, self._share = config, samples, samples / world_size
        self._known = set(known)
        self._found = 0
        self._lock = threading.Lock()

    def holds(self, skip: Skip) -> bool:
        """Whether a block is skipped, by itself or with its shard."""
        return skip in self._known or (*skip[:2], WHOLE_SHARD) in self._known

    def add(self, skip: Skip, samples: int, error: LatheError) -> None:
        """Skip `samples` more because of `error`. Raises it where that is not wanted, or where they are too many."""
        if self._config.on_damage == "fail":
            raise error
        with self._lock:
            if skip in self._known:
                return
            self._known.add(skip)
            self._found += samples
            found = self._found
        if found > self._config.max_skip_rate * self._share:
            raise type(error)(
                f"{error.message}; with it {found} samples were skipped, more than loader.max_skip_rate="
                f"{self._config.max_skip_rate:g} of this rank's {self._share:.0f}",
                error.remedy,
            ) from error
        _log.warning("%s; its %d samples are skipped from now on", error.message, samples)

    def all(self) -> list[Skip]:
        """Every one, sorted."""
        with self._lock:
            return sorted(self._known)


class BlockSource:
    """Plans and blocks of all streams; safe in threads.

    Args:
        datasets: what is read.
        config: how.
        skips: which blocks are not.
        pool: does the reading; None = whoever asks.
        plans_kept: of how many shards the plans are kept, a few kB each.
    """

    def __init__(
        self,
        datasets: DataSets,
        config: LoaderConfig,
        skips: SkipList,
        pool: ThreadPoolExecutor | None,
        plans_kept: int,
    ) -> None:
        self._datasets, self._skips, self._pool, self._plans_kept = datasets, skips, pool, plans_kept
        self._cache = BlockCache(config.cache, int(config.cache_gib * 2**30)) if config.cache else None
        self.layouts = [
            Layout.of(datasets.manifests[stream.dataset], stream.bucket, flip=config.flip)
            for stream in datasets.streams
        ]
        self._plans: dict[tuple[int, int], Pending[Plans]] = {}
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def plans(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], ShardPlan | None]:
        """Where the blocks of streams' shards are, by (stream, shard); None for a shard that is skipped.

        Raises:
            DataError: a receipt is damaged, or of another encoding than the manifest.
            StorageError: it cannot be read.
        """
        streams = self._datasets.streams
        asked = {(s, shard): self._ask((streams[s].dataset, shard)) for s, shard in wanted}
        while len(self._plans) > max(self._plans_kept, len(asked)):
            del self._plans[next(iter(self._plans))]
        found: dict[tuple[int, int], ShardPlan | None] = {}
        for (s, shard), pending in asked.items():
            try:
                whole = (streams[s].dataset, shard, WHOLE_SHARD)
                found[s, shard] = None if self._skips.holds(whole) else pending.result()[streams[s].bucket]
            except (DataError, StorageError) as error:
                manifest = self._datasets.manifests[streams[s].dataset]
                self._skips.add(whole, manifest.shards[shard].samples(self._datasets.split), error)
                found[s, shard] = None
        return found

    def read(self, stream: int, shard: int, plan: ShardPlan, first: int, end: int) -> Pending[list[LatentBlock | None]]:
        """The blocks [first, end) of a plan, which follow each other in the file; None for each that is skipped.

        Getting the result raises DataError for bytes that are missing, changed or not what the manifest says, and
        StorageError where they cannot be read.
        """
        return Pending(partial(self._read, stream, shard, plan, range(first, end)), self._pool)

    def _ask(self, place: tuple[int, int]) -> Pending[Plans]:
        dataset, shard = place
        if place in self._plans:
            self._plans[place] = self._plans.pop(place)  # used last
        else:
            store, manifest = self._datasets.stores[dataset], self._datasets.manifests[dataset]
            work = partial(load_plans, store, manifest, shard, self._datasets.split)
            self._plans[place] = Pending(work, self._pool)
        return self._plans[place]

    def _read(self, stream: int, shard: int, plan: ShardPlan, blocks: Sequence[int]) -> list[LatentBlock | None]:
        dataset = self._datasets.streams[stream].dataset
        found: dict[int, LatentBlock | None] = {}
        for block in blocks:
            if self._skips.holds((dataset, shard, int(plan.numbers[block]))):
                found[block] = None
            elif (kept := self._cached(stream, shard, plan, block)) is not None:
                found[block] = kept
        missing = [block for block in blocks if block not in found]
        for _, run in groupby(enumerate(missing), lambda place: place[1] - place[0]):
            found.update(self._fetch(stream, shard, plan, [block for _, block in run]))
        return [found[block] for block in blocks]

    def _cached(self, stream: int, shard: int, plan: ShardPlan, block: int) -> LatentBlock | None:
        if self._cache is None:
            return None
        name = self._name(stream, shard, plan, block)
        data = self._cache.get(name, int(plan.length[block]))
        try:
            if data is not None:
                parsed = parse_block(data, plan, block, self.layouts[stream], name)
                self._count(cached_blocks=1)
                return parsed
        except DataError:
            self._cache.drop(name)
        return None

    def _fetch(self, stream: int, shard: int, plan: ShardPlan, blocks: Sequence[int]) -> dict[int, LatentBlock | None]:
        """Blocks that follow each other, in one request; what cannot be used is asked for once more, alone."""
        try:
            data = memoryview(self._bytes(stream, shard, plan, blocks[0], blocks[-1]))
        except StorageError as error:
            for block in blocks:
                self._skip(stream, shard, plan, block, error)
            return dict.fromkeys(blocks)
        found: dict[int, LatentBlock | None] = {}
        for block in blocks:
            start = int(plan.offset[block] - plan.offset[blocks[0]])
            part = data[start : start + int(plan.length[block])]
            try:
                found[block] = self._parsed(stream, shard, plan, block, part)
            except DataError:
                found[block] = self._again(stream, shard, plan, block)
        return found

    def _again(self, stream: int, shard: int, plan: ShardPlan, block: int) -> LatentBlock | None:
        self._count(blocks_read_again=1)
        try:
            return self._parsed(stream, shard, plan, block, self._bytes(stream, shard, plan, block, block))
        except (DataError, StorageError) as error:
            self._skip(stream, shard, plan, block, error)
            return None

    def _parsed(self, stream: int, shard: int, plan: ShardPlan, block: int, data: bytes | memoryview) -> LatentBlock:
        parsed = parse_block(data, plan, block, self.layouts[stream], self.address(stream, shard))
        if self._cache is not None:
            self._cache.put(self._name(stream, shard, plan, block), data)
        return parsed

    def _bytes(self, stream: int, shard: int, plan: ShardPlan, first: int, last: int) -> bytes:
        dataset = self._datasets.streams[stream].dataset
        start, end = int(plan.offset[first]), int(plan.offset[last] + plan.length[last])
        name = self._datasets.manifests[dataset].shards[shard].name
        data = self._datasets.stores[dataset].read(name, start, end)
        self._count(requests=1, bytes_read=len(data), blocks_read=last - first + 1)
        return data

    def _skip(self, stream: int, shard: int, plan: ShardPlan, block: int, error: LatheError) -> None:
        skip = (self._datasets.streams[stream].dataset, shard, int(plan.numbers[block]))
        self._skips.add(skip, int(plan.samples[block]), error)

    def _name(self, stream: int, shard: int, plan: ShardPlan, block: int) -> str:
        manifest = self._datasets.manifests[self._datasets.streams[stream].dataset]
        return block_name(manifest.shards[shard].sha256, int(plan.offset[block]), int(plan.length[block]))

    def address(self, stream: int, shard: int) -> str:
        """A shard's address, for messages."""
        dataset = self._datasets.streams[stream].dataset
        return (
            f"{self._datasets.stores[dataset].url.rstrip('/')}/{self._datasets.manifests[dataset].shards[shard].name}"
        )

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self.counts.update(amounts)
