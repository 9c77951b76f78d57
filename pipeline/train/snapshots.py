"""Snapshots of the power function averages, from which `lathe ema` makes averages of other lengths.

They lie in `ema/` below the run's output, each a checkpoint that holds averages alone, and have a retention of their
own: Karras et al. 2024 (https://arxiv.org/abs/2312.02696, section 3.2) keep all.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config import TrainConfig
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint, sharded
from pipeline.train.optimizer import average_key

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
        process: this rank.
        engine: whose averages are saved.
        config: the run file.
    """

    def __init__(self, run: Store, process: Process, engine: Engine, config: TrainConfig) -> None:
        self._store, self._process, self._engine, self._config = snapshot_store(run), process, engine, config
        self._taken: list[int] = []  # steps in order; rank 0 alone keeps them

    def resume(self, step: int, texts: Mapping[str, bytes]) -> list[str]:
        """Before the first step, on all ranks: what belongs to another course is deleted, what is missing is taken.

        A run that goes back to a checkpoint leaves snapshots of later steps, whose averages are not of its weights.
        One that ended right after a checkpoint has no snapshot of that step, if it was to have one.

        Args:
            step: steps done.
            texts: the checkpoint's, see `sharded.save`.

        Returns:
            names of what was deleted, on rank 0.

        Raises:
            StorageError: on the rank that met the problem; LatheError on the others.
        """
        gone: list[str] = []

        def look() -> None:
            if self._process.is_main:
                gone.extend(checkpoint.clear_later(self._store, step))
                self._taken = sorted(found.step for found in checkpoint.find(self._store))

        sharded.together(self._process, look)
        if due(self._config, step) and self._process.any(self._process.is_main and step not in self._taken):
            self.save(step, texts)
        return gone

    def save(self, step: int, texts: Mapping[str, bytes]) -> None:
        """Write a snapshot, and delete those that are too old; all ranks call it at the same step.

        Args:
            step: steps done.
            texts: the checkpoint's, see `sharded.save`.

        Raises:
            StorageError: on the rank that could not write or delete; LatheError on the others.
        """
        if state.optimizer_step(self._engine) == 0:
            return  # every step so far was skipped: there is nothing to average
        keys = [average_key(average.name) for average in self._config.ema.profiled]
        sharded.save(self._store, self._process, self._engine, step=step, texts=texts, counters={}, notes={}, keys=keys)
        sharded.together(self._process, lambda: self._retire(step) if self._process.is_main else None)

    def _retire(self, newest: int) -> None:
        self._taken.append(newest)
        for step in self._taken[: -(self._config.ema.snapshot_keep or len(self._taken))]:
            checkpoint.clear(self._store, checkpoint.step_name(step))
            self._taken.remove(step)
