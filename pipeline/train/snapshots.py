"""Snapshots of the power function averages, from which `lathe ema` makes averages of other lengths.

They lie in `ema/` below the run's output, each a checkpoint that holds averages alone, are stored in the background as
checkpoints are, and have a retention of their own: Karras et al. 2024 (https://arxiv.org/abs/2312.02696, section 3.2)
keep all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.config import TrainConfig
from pipeline.data.threads import WorkerThreads
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint, sharded
from pipeline.train.optimizer import average_key
from pipeline.train.saver import Saver
from pipeline.train.shelf import Shelf, newest_and_every

_FOLDER = "ema"


def snapshot_store(run: Store) -> Store:
    """Where a run's snapshots lie."""
    return open_store(f"{run.url}/{_FOLDER}")


def due(config: TrainConfig, step: int) -> bool:
    """Whether a snapshot is taken after `step` steps."""
    every = config.ema.snapshot_every
    return every is not None and step > 0 and (step % every == 0 or step == config.steps)


def is_missing(run: Store, config: TrainConfig, step: int) -> bool:
    """Whether there ought to be a snapshot of a step, and is none: the run ended between checkpoint and snapshot."""
    return due(config, step) and not snapshot_store(run).exists(f"{checkpoint.step_name(step)}/{checkpoint.COMPLETE}")


class Snapshots:
    """A run's snapshots: taken, told apart from those of another course, and kept so many.

    Args:
        run: the run's output.
        ranks: this rank among the others.
        engine: whose averages are saved.
        config: the run file.
        worker: one background thread.
        texts: the checkpoint's, see `Saver`.
        step: steps done. Snapshots of later ones, whose averages are not of these weights, are deleted.
        check: that the output is still this run's.

    Raises:
        StorageError: on the rank that met the problem; LatheError on the others.
    """

    def __init__(
        self,
        run: Store,
        ranks: Process,
        engine: Engine,
        config: TrainConfig,
        worker: WorkerThreads,
        *,
        texts: Mapping[str, bytes],
        step: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._config = engine, config
        store = snapshot_store(run)
        shelf = Shelf(store, newest_and_every(config.ema.snapshot_keep))
        self.gone: list[str] = []
        """Names of the snapshots that were deleted at the start, on rank 0."""

        def look() -> None:
            if ranks.is_main:
                self.gone.extend(shelf.open(step, clear_later=True))

        sharded.together(ranks, look)
        self.saver = Saver(
            store,
            ranks,
            engine,
            worker,
            shelf,
            texts=texts,
            keys=[average_key(average.name) for average in config.ema.profiled],
            limit=config.checkpoint.max_failures,
            before_marker=check,
        )
        # a run that ended between checkpoint and snapshot has none of its last step
        if due(config, step) and ranks.any(ranks.is_main and step not in shelf.steps):
            self.take(step)

    def take(self, step: int, *, last: bool = False) -> None:
        """Begin a snapshot; all ranks call it at the same step. `last` and errors as of `Saver.begin`."""
        if state.optimizer_step(self._engine):  # or every step so far was skipped: there is nothing to average
            self.saver.begin(step, counters={}, notes={}, last=last)
