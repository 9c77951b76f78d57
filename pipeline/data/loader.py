"""Latent shards to training batches: the same global batches at any world size, from any step.

Legend: b samples of this rank, w window.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from pipeline.config import LoaderConfig
from pipeline.data.ahead import Ahead
from pipeline.data.assemble import Assembler
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockSource
from pipeline.data.order import Order, rank_positions
from pipeline.data.planner import HURRIED_STEPS, Planner
from pipeline.data.skips import SkipList
from pipeline.data.threads import WorkerThreads
from pipeline.errors import ConfigError, SetupError
from pipeline.memory import keep_freed

_PLANS_KEPT = 1024  # shards; more where positions and streams are in more of them
_LOCAL_REQUESTS, _S3_REQUESTS = 4, 16
_LAST_REQUESTS_SECONDS = 2.0  # what closing waits for requests that are under way


class LatentLoader:
    """An endless iterator over this rank's batches, read ahead by threads. Close it, or use it as a context.

    What a batch holds depends on data sets, seed, global batch, window and step alone; of `config` only `flip` matters.
    Memory is bounded by the window, whatever the data's size: for each picture size of each data set b windows with the
    blocks at their ends, at most b * (window + 2 blocks) samples as the tar has them; and the batches under way. The
    process keeps what it frees, see `pipeline.memory.keep_freed`.

    Iterating raises DataError for a damaged block and StorageError for one that cannot be read, after all batches
    before it; then the loader is closed. Closed by another thread, it ends. It is not for a process forked since it was
    opened: iterating it there raises SetupError, closing it there does nothing.

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
        if start_step < origin:
            raise ConfigError(f"the order begins with step {origin}, and step {start_step} is before", "start later")
        keep_freed()
        self.datasets = datasets
        config = config or LoaderConfig()
        positions = rank_positions(global_batch, rank, world_size)
        sizes = [stream.sizes for stream in datasets.streams]
        order = Order(sizes, global_batch=global_batch, seed=seed, window=window, groups=datasets.groups)
        plans_kept = max(_PLANS_KEPT, 2 * len(positions) * len(datasets.streams))
        self._skips = SkipList(config, datasets.samples, skipped)
        remote = any(store.url.startswith("s3://") for store in datasets.stores)
        at_once = config.requests or (_S3_REQUESTS if remote else _LOCAL_REQUESTS)
        requests = WorkerThreads(at_once if config.workers else 0, "latent-blocks")
        self._source = BlockSource(datasets, config, self._skips, requests, plans_kept)
        self._planner = Planner(
            datasets, order, self._source, positions, origin=origin, plans_kept=plans_kept, hurried=HURRIED_STEPS
        )
        self._assembler = Assembler(datasets, self._source.layouts, positions, seed)
        self._step = start_step
        self._ahead = None
        if config.workers:
            ahead = (self._planner.plan, self._assembler.batch, start_step, config.steps_ahead, config.workers)
            self._ahead = Ahead(*ahead)
        self._closed = False
        # threads end with the loader, also where nobody closes it
        self._process = os.getpid()
        self._close = weakref.finalize(self, _close, self._process, self._source, self._ahead, requests)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.take()
        if batch is None:
            raise StopIteration
        return batch

    def take(self, gives_up: Callable[[], bool] | None = None) -> Batch | None:
        """The next batch, as iterating gives it; None where the loader is closed.

        Args:
            gives_up: asked ten times a second while there is no batch yet (only with `workers`); once it says yes None
                is returned, and the batch is still the next one.
        """
        if self._closed:
            return None
        if os.getpid() != self._process:
            raise SetupError("a loader was opened before its process was forked", "open another one in each process")
        try:
            if self._ahead is None:
                batch: Batch | None = self._assembler.batch(self._planner.plan(self._step))
            else:
                batch = self._ahead.take(gives_up)
        except BaseException:
            self.close()
            raise
        self._step += batch is not None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where to resume: the step that comes next, and what is skipped. What was read ahead does not count."""
        return {"step": self._step, "skipped": self.skipped}

    @property
    def skipped(self) -> list[list[int]]:
        """Blocks whose samples have weight 0: data set, shard, number in the receipt (-1 = the shard), samples."""
        return self._skips.all()

    @property
    def counts(self) -> dict[str, int]:
        """`requests`, `bytes_read`, `blocks_read`, `cached_blocks`, `blocks_read_again` so far; `blocks_held` now."""
        names = ("requests", "bytes_read", "blocks_read", "cached_blocks", "blocks_read_again")
        return {**{name: self._source.counts[name] for name in names}, "blocks_held": self._planner.blocks_held}

    def close(self) -> None:
        """Stop the threads, from whichever thread; requests under way are waited for shortly. May be called twice."""
        self._closed = True
        self._close()

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(process: int, source: BlockSource, ahead: Ahead | None, requests: WorkerThreads) -> None:
    if os.getpid() != process:  # a fork has none of the threads, and may have locks that they held
        return
    source.close()
    if ahead is not None:
        ahead.stop()
    requests.close(_LAST_REQUESTS_SECONDS)
    if ahead is not None:
        ahead.join(_LAST_REQUESTS_SECONDS)
