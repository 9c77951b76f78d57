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
    return every is not None and (step % every == 0 or step == config.steps)


def save(
    run: Store, process: Process, engine: Engine, config: TrainConfig, *, step: int, texts: Mapping[str, bytes]
) -> None:
    """Write a snapshot; all ranks call it at the same step, before a checkpoint of that step.

    Later snapshots are deleted: they are of a course that the run went back on when it was resumed.

    Args:
        run: the run's output.
        process: this rank.
        engine: whose averages are saved.
        config: the run file.
        step: steps done.
        texts: the checkpoint's, see `sharded.save`.

    Raises:
        StorageError: on the rank that could not write; LatheError on the others.
    """
    if state.optimizer_step(engine) == 0:
        return  # every step so far was skipped: there is nothing to average
    store = snapshot_store(run)
    keys = [average_key(average.name) for average in config.ema.profiled]
    sharded.save(store, process, engine, step=step, texts=texts, counters={}, notes={}, keys=keys)
    if process.is_main:
        for found in checkpoint.find(store):
            if found.step > step:
                checkpoint.clear(store, found.name)
        if config.ema.snapshot_keep:
            checkpoint.keep_newest(store, config.ema.snapshot_keep)
