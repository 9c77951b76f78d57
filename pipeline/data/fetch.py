"""Blocks from storage, or from the local cache: read in few requests, checked, read again once, skipped by option."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from itertools import groupby
from typing import NamedTuple

from pipeline.config import LoaderConfig
from pipeline.data.cache import BlockCache, block_name
from pipeline.data.datasets import DataSets
from pipeline.data.latent_block import LatentBlock, check_block, index_block
from pipeline.data.layout import Layout
from pipeline.data.manifest import Bucket
from pipeline.data.shard_plan import ShardPlan, load_plans
from pipeline.data.skips import WHOLE_SHARD, SkipList
from pipeline.data.threads import WorkerThreads
from pipeline.errors import DataError, LatheError, StorageError

Plans = Mapping[Bucket, ShardPlan]
Data = bytes | memoryview
_IN_VAIN = 2  # blocks in a row that cannot be read alone either: the rest of their request is not tried


class BlockReference:
    """One block, here or under way; as long as somebody refers to it, others find it and need not read it again.

    Its samples are looked up by whoever wants it first: threads that read would wait for each other to do it, as only
    one at a time can run Python.

    Args:
        index: from its checked bytes to the block; None where it is skipped after all.
    """

    __slots__ = ("__weakref__", "_block", "_error", "_index", "_lock", "future")

    def __init__(self, index: Callable[[Data], LatentBlock | None]) -> None:
        self.future: Future[Data | None] = Future()
        self._index: Callable[[Data], LatentBlock | None] | None = index
        self._block: LatentBlock | None = None
        self._error: LatheError | None = None
        self._lock = threading.Lock()

    def get(self) -> LatentBlock | None:
        """The block, waited for; None where it is skipped. Raises what reading it raised."""
        if self._index is not None:
            data = self.future.result()
            with self._lock:
                if self._index is not None:
                    self._fill(self._index, data)
        if self._error is not None:
            raise self._error
        return self._block

    def _fill(self, index: Callable[[Data], LatentBlock | None], data: Data | None) -> None:
        try:
            self._block = None if data is None else index(data)
        except LatheError as error:
            self._error = error
        self._index = None  # last, as others look at it without the lock


_Wanted = dict[int, "Future[Data | None]"]


class _Shard(NamedTuple):
    """What a stream has in a shard."""

    stream: int
    number: int
    plan: ShardPlan


class BlockSource:
    """Plans and blocks of all streams; safe in threads.

    Args:
        datasets: what is read.
        config: how.
        skips: which blocks are not.
        threads: they do the reading.
        plans_kept: of how many shards the plans are kept, a few kB each.
    """

    def __init__(
        self, datasets: DataSets, config: LoaderConfig, skips: SkipList, threads: WorkerThreads, plans_kept: int
    ) -> None:
        self._datasets, self._config, self._skips, self._threads = datasets, config, skips, threads
        self._cache = BlockCache(config.cache, int(config.cache_gib * 2**30)) if config.cache else None
        self.layouts = [
            Layout.of(datasets.manifests[stream.dataset], stream.bucket, flip=config.flip)
            for stream in datasets.streams
        ]
        self._plans: dict[tuple[int, int], Future[Plans]] = {}
        self._plans_kept = plans_kept
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def close(self) -> None:
        """Begin no further request."""
        self._closing.set()

    def plans(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], ShardPlan | None]:
        """Where the blocks of streams' shards are, by (stream, shard); None for a shard that is skipped.

        Raises:
            DataError: a receipt is damaged, or of another encoding than the manifest.
            StorageError: it cannot be read.
        """
        streams = self._datasets.streams
        whole = {(s, shard): (streams[s].dataset, shard, WHOLE_SHARD) for s, shard in wanted}
        asked = {place: self._ask(skip[:2]) for place, skip in whole.items() if not self._skips.holds(skip)}
        while len(self._plans) > max(self._plans_kept, len(asked)):
            del self._plans[next(iter(self._plans))]
        found: dict[tuple[int, int], ShardPlan | None] = dict.fromkeys(whole)
        for (s, shard), plans in asked.items():
            try:
                found[s, shard] = plans.result()[streams[s].bucket]
            except (DataError, StorageError) as error:
                entry = self._datasets.manifests[streams[s].dataset].shards[shard]
                self._skips.add(whole[s, shard], entry.samples(self._datasets.split), error)
        return found

    def read(self, stream: int, shard: int, plan: ShardPlan, blocks: Sequence[int]) -> list[BlockReference]:
        """Ask for blocks that follow each other in the file, in one request.

        Getting one raises DataError for bytes that are missing, changed or not what the manifest says, and StorageError
        where they cannot be read; the others of the request have nothing to do with that.
        """
        at = _Shard(stream, shard, plan)
        references = [BlockReference(partial(self._indexed, at, block)) for block in blocks]
        futures = [reference.future for reference in references]
        self._threads.submit(partial(self._fill, at, dict(zip(blocks, futures, strict=True))), futures)
        return references

    def _ask(self, place: tuple[int, int]) -> Future[Plans]:
        if place in self._plans:
            self._plans[place] = self._plans.pop(place)  # used last
            return self._plans[place]
        dataset, shard = place
        store, manifest, split = self._datasets.stores[dataset], self._datasets.manifests[dataset], self._datasets.split
        future: Future[Plans] = Future()
        self._plans[place] = future
        # urgent: the plan of all steps that follow waits for it
        self._threads.submit(
            lambda: future.set_result(load_plans(store, manifest, shard, split)), [future], urgent=True
        )
        return future

    def _fill(self, at: _Shard, wanted: _Wanted) -> None:
        """Read what is neither skipped nor kept, and fill in the futures."""
        missing = []
        for block, future in wanted.items():
            skipped = self._skips.holds(
                (self._datasets.streams[at.stream].dataset, at.number, int(at.plan.numbers[block]))
            )
            kept = None if skipped else self._kept(at, block)
            if skipped or kept is not None:
                future.set_result(kept)
            else:
                missing.append(block)
        for _, run in groupby(enumerate(missing), lambda place: place[1] - place[0]):
            blocks = [block for _, block in run]
            self._fetch(at, {block: wanted[block] for block in blocks})

    def _kept(self, at: _Shard, block: int) -> Data | None:
        if self._cache is None:
            return None
        name = self._name(at, block)
        data = self._cache.get(name, int(at.plan.length[block]))
        if data is None:
            return None
        try:
            check_block(data, at.plan, block, name)
        except DataError:
            self._cache.drop(name)
            return None
        self._count(cached_blocks=1)
        return data

    def _fetch(self, at: _Shard, wanted: _Wanted) -> None:
        """Blocks that follow each other, in one request; what cannot be used is asked for once more, alone."""
        blocks = list(wanted)
        try:
            data = memoryview(self._bytes(at, blocks[0], blocks[-1]))
        except StorageError as error:
            self._fetch_alone(at, wanted, error)
            return
        for block, future in wanted.items():
            start = int(at.plan.offset[block] - at.plan.offset[blocks[0]])
            part = data[start : start + int(at.plan.length[block])]
            try:
                # a copy, or each block would keep the whole request in memory
                found = self._checked(at, block, part if len(blocks) == 1 else bytes(part))
            except (DataError, StorageError) as error:
                self._give_up(at, block, error, future)
            else:
                future.set_result(found)

    def _fetch_alone(self, at: _Shard, wanted: _Wanted, fault: StorageError) -> None:
        """Blocks of a request that failed; where nothing may be skipped, or nothing is read alone either, all fail."""
        in_vain = _IN_VAIN if len(wanted) == 1 or self._config.on_damage == "fail" else 0
        for block, future in wanted.items():
            error: LatheError = fault
            if in_vain < _IN_VAIN:
                try:
                    future.set_result(self._checked(at, block, self._bytes(at, block, block)))
                    in_vain = 0
                    continue
                except StorageError as alone:
                    error, in_vain = alone, in_vain + 1
                except DataError as alone:
                    error = alone
            self._give_up(at, block, error, future)

    def _checked(self, at: _Shard, block: int, data: Data) -> Data:
        """These bytes of a block, or where they are not right others."""
        try:
            check_block(data, at.plan, block, self._address(at))
        except DataError:
            self._count(blocks_read_again=1)
            data = self._bytes(at, block, block)
            check_block(data, at.plan, block, self._address(at))
        if self._cache is not None:
            self._cache.put(self._name(at, block), data)
        return data

    def _indexed(self, at: _Shard, block: int, data: Data) -> LatentBlock | None:
        try:
            return index_block(data, at.plan, block, self.layouts[at.stream], self._address(at))
        except DataError as error:
            self._skip(at, block, error)
            return None

    def _bytes(self, at: _Shard, first: int, last: int) -> bytes:
        if self._closing.is_set():
            raise CancelledError
        dataset = self._datasets.streams[at.stream].dataset
        start, end = int(at.plan.offset[first]), int(at.plan.offset[last] + at.plan.length[last])
        name = self._datasets.manifests[dataset].shards[at.number].name
        data = self._datasets.stores[dataset].read(name, start, end)
        self._count(requests=1, bytes_read=len(data), blocks_read=last - first + 1)
        return data

    def _give_up(self, at: _Shard, block: int, error: LatheError, future: Future[Data | None]) -> None:
        try:
            self._skip(at, block, error)
            future.set_result(None)
        except LatheError as fault:
            future.set_exception(fault)

    def _skip(self, at: _Shard, block: int, error: LatheError) -> None:
        """Skip a block because of `error`. Raises it where that is not wanted."""
        skip = (self._datasets.streams[at.stream].dataset, at.number, int(at.plan.numbers[block]))
        if isinstance(error, StorageError):  # which tells the file alone
            error = StorageError(f"{self._address(at)}: {at.plan.place(block)}: {error.message}", error.remedy)
        self._skips.add(skip, int(at.plan.samples[block]), error)

    def _name(self, at: _Shard, block: int) -> str:
        manifest = self._datasets.manifests[self._datasets.streams[at.stream].dataset]
        return block_name(manifest.shards[at.number].sha256, int(at.plan.offset[block]), int(at.plan.length[block]))

    def _address(self, at: _Shard) -> str:
        dataset = self._datasets.streams[at.stream].dataset
        name = self._datasets.manifests[dataset].shards[at.number].name
        return f"{self._datasets.stores[dataset].url.rstrip('/')}/{name}"

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self.counts.update(amounts)
