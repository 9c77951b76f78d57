"""Latent shards to training batches: the same global batches at any world size, from any step.

Legend: b samples of this rank, w window, C latent channels, h and w sides of the latent, L tokens of a caption.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockSource, Skip, SkipList
from pipeline.data.gather import gather
from pipeline.data.latent_block import LatentBlock
from pipeline.data.manifest import key_hash
from pipeline.data.order import Integers, Order, rank_positions
from pipeline.data.planner import PlannedStep, Planner
from pipeline.randomness import Purpose, uniform

_PLANS_KEPT = 1024  # shards; more where positions and streams are in more of them


class LatentLoader:
    """An endless iterator over this rank's batches, read ahead by threads. Close it, or use it as a context.

    What a batch holds depends on data sets, seed, global batch, window and step alone; of `config` only `flip` matters.
    Memory is bounded by the window, whatever the data's size: for each picture size b windows with the blocks at their
    ends, at most b * (window + 2 blocks) samples; and the batches under way.

    Iterating raises DataError for a damaged block and StorageError for one that cannot be read, after all batches
    before it; then the loader is closed.

    Args:
        datasets: what is read, see `open_datasets`.
        global_batch: samples per step over all ranks.
        seed: of the run.
        window: samples that are shuffled together within each run of an epoch (see `order`).
        rank: this process among all.
        world_size: number of processes; must divide the global batch.
        origin: the step with which the order begins: not 0 where a run went on with other data.
        start_step: the first step to yield: `state_dict()["step"]` of the run that is resumed.
        skipped: `state_dict()["skipped"]` of that run, of all its ranks.
        config: how latents are read.

    Raises:
        ConfigError: the world size does not divide the global batch; the cache's folder cannot be used.
        DataError: the latents are none that this version reads.
    """

    def __init__(
        self,
        datasets: DataSets,
        *,
        global_batch: int,
        seed: int,
        window: int,
        rank: int = 0,
        world_size: int = 1,
        origin: int = 0,
        start_step: int = 0,
        skipped: Iterable[Sequence[int]] = (),
        config: LoaderConfig | None = None,
    ) -> None:
        self.datasets = datasets
        self._seed, self._config = seed, config or LoaderConfig()
        self._positions = rank_positions(global_batch, rank, world_size)
        sizes = [stream.sizes for stream in datasets.streams]
        order = Order(sizes, global_batch=global_batch, seed=seed, window=window, groups=datasets.groups)
        known = [(dataset, shard, block) for dataset, shard, block in skipped]
        self._skips = SkipList(self._config, sum(stream.samples for stream in order.streams), world_size, known)
        self._pool = ThreadPoolExecutor(self._config.requests, "latent-blocks") if self._config.workers else None
        plans_kept = max(_PLANS_KEPT, 2 * len(self._positions) * len(datasets.streams))
        self._source = BlockSource(datasets, self._config, self._skips, self._pool, plans_kept)
        self._planner = Planner(datasets, order, self._source, self._positions, origin)
        self._step = self._first_step = start_step
        self._ahead = _Ahead(self, self._config) if self._config.workers else None
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            batch = self._ahead.take() if self._ahead else self.assemble(self.plan(self._step))
        except BaseException:
            self.close()
            raise
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where to resume: the step that comes next, and what is skipped. What was read ahead does not count."""
        return {"step": self._step, "skipped": [list(skip) for skip in self.skipped]}

    @property
    def skipped(self) -> list[Skip]:
        """Blocks whose samples have weight 0: data set, shard, number in the receipt (-1 = the whole shard)."""
        return self._skips.all()

    @property
    def counts(self) -> dict[str, int]:
        """`requests`, `bytes_read`, `blocks_read`, `cached_blocks`, `blocks_read_again` so far; `blocks_held` now."""
        names = ("requests", "bytes_read", "blocks_read", "cached_blocks", "blocks_read_again")
        return {**{name: self._source.counts[name] for name in names}, "blocks_held": self._planner.blocks_held}

    def close(self) -> None:
        """Stop the threads, after the requests that are under way. May be called twice."""
        self._closed = True
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._ahead:
            self._ahead.close()
        if self._pool:
            self._pool.shutdown()

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def plan(self, step: int) -> PlannedStep:
        """What a step reads; for `_Ahead`. At the start somebody waits: then no more is asked for than is needed."""
        return self._planner.plan(step, hurry=step < self._first_step + self._config.steps_ahead)

    def assemble(self, planned: PlannedStep) -> Batch:
        """The batch of a planned step, once its blocks are here; for `_Ahead`."""
        places = planned.places
        stream = int(places.stream[0])
        bucket, layout = self.datasets.streams[stream].bucket, self._source.layouts[stream]
        rows: list[tuple[LatentBlock, int] | None] = []
        for place in planned.rows:
            block = None if place is None else place[0].get()
            rows.append(None if block is None or place is None else (block, place[1]))
        keys = ["" if row is None else row[0].keys[row[1]] for row in rows]
        captions, mirrored = self._draw(places.epoch, keys, rows)
        arrays = gather(rows, captions.tolist(), mirrored.tolist(), layout)
        batch = Batch(
            step=planned.step,
            bucket=bucket,
            positions=torch.from_numpy(self._positions),
            epochs=torch.from_numpy(places.epoch),
            datasets=torch.tensor([self.datasets.streams[s].dataset for s in places.stream.tolist()]),
            moments=arrays.moments,
            text=arrays.text,
            size=arrays.size,
            weight=torch.tensor([float(row is not None) for row in rows]),
            mirrored=torch.from_numpy(mirrored),
            keys=keys,
            captions=captions.tolist(),
        )
        # a forked child cannot use CUDA
        pins = torch.cuda.is_available() and torch.utils.data.get_worker_info() is None
        return batch.pin_memory() if pins else batch

    def _draw(
        self, epochs: Integers, keys: Sequence[str], rows: Sequence[tuple[LatentBlock, int] | None]
    ) -> tuple[Integers, NDArray[np.bool_]]:
        """The caption of each sample, and whether it is mirrored: drawn by (seed, epoch, key)."""
        counts = np.array([1 if row is None else row[0].captions(row[1]) for row in rows])
        flips = np.array([row is not None and row[0].mirrored for row in rows])
        captions, mirrored = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
        if counts.max() == 1 and not flips.any():
            return captions, mirrored
        hashes = torch.tensor([key_hash(key) >> 1 for key in keys])  # 63 bits, as int64 has no more
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keyed = hashes[torch.from_numpy(here)]
            if counts.max() > 1:
                drawn = uniform(self._seed, Purpose.CAPTION_CHOICE, epoch, keyed, ()).double().numpy()
                captions[here] = (drawn * counts[here]).astype(np.int64)
            if flips.any():
                mirrored[here] = flips[here] & (uniform(self._seed, Purpose.FLIP, epoch, keyed, ()).numpy() < 0.5)
        return captions, mirrored


class _Ahead:
    """Plans steps in a thread, so that their blocks are asked for; assembles the next few in others."""

    def __init__(self, loader: LatentLoader, config: LoaderConfig) -> None:
        self._loader, self._steps = loader, config.steps_ahead
        self._assembled = config.workers + 1  # batches that may be ready, or under way
        self._planned: deque[PlannedStep | BaseException] = deque()
        self._batches: deque[Future[Batch]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._pool = ThreadPoolExecutor(config.workers, "latent-batches")
        self._next = loader.state_dict()["step"]
        self._thread = threading.Thread(target=self._run, name="latent-plan", daemon=True)
        self._thread.start()

    def take(self) -> Batch:
        """The next batch, waited for."""
        with self._changed:
            while not self._batches:
                self._changed.wait()
            batch = self._batches.popleft()
            self._submit()
        return batch.result()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        planned: PlannedStep | BaseException
        while True:
            with self._changed:
                while len(self._planned) + len(self._batches) > self._steps and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                planned = self._loader.plan(self._next)
            except BaseException as error:
                planned = error  # told when its turn comes
            self._next += 1
            with self._changed:
                self._planned.append(planned)
                self._submit()
            if isinstance(planned, BaseException):
                return

    def _submit(self) -> None:
        """Have planned steps assembled, as far as there is room. The lock is held."""
        while self._planned and len(self._batches) < self._assembled and not self._closed:
            planned = self._planned.popleft()
            if isinstance(planned, BaseException):
                failed: Future[Batch] = Future()
                failed.set_exception(planned)
                self._batches.append(failed)
            else:
                self._batches.append(self._pool.submit(self._loader.assemble, planned))
        self._changed.notify_all()
