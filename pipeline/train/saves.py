"""A run's checkpoints: the newest one is gone on from, new ones are saved, old ones retired."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.data.datasets import DataSets
from pipeline.errors import LatheError
from pipeline.metrics import Metrics
from pipeline.runtime.engine import Engine, LossScale
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train import checkpoint, sharded
from pipeline.train.compatibility import check_resume
from pipeline.train.initial import ORIGIN, begin, origin_of
from pipeline.train.progress import Progress
from pipeline.train.snapshots import Snapshots
from pipeline.train.telling import say
from pipeline.train.trained_on import TrainedOn, files


class Saves:
    """What a run leaves in its output: checkpoints, and snapshots of averages.

    Args:
        store: the run's output.
        ranks: this rank among the others.
        engine: whose state is saved.
        engine_config: its whole configuration.
        config: the run file.
        datasets: the latents.
        metrics: told of each checkpoint, and made durable with it.
    """

    def __init__(
        self,
        store: Store,
        ranks: Process,
        engine: Engine,
        *,
        engine_config: Mapping[str, Any],
        config: TrainConfig,
        datasets: DataSets,
        metrics: Metrics,
    ) -> None:
        self._store, self._ranks, self._engine, self._metrics = store, ranks, engine, metrics
        self._engine_config, self._config, self._datasets = engine_config, config, datasets
        self._snapshots = Snapshots(store, ranks, engine, config)
        self._origin: dict[str, Any] | None = None
        self.newest = 0
        """Step of the newest checkpoint; 0 = none."""

    def resume(self, progress: Progress) -> None:
        """Load the newest checkpoint that is whole; a damaged one is passed over, and one rank says so.

        Where there is none, the run begins with what `init_from` names.

        Raises:
            DataError, ConfigError: the checkpoint is of another run.
            LatheError: there are checkpoints, and none can be read.
        """
        config, there = self._config, checkpoint.find(self._store, warn=self._ranks.is_main)
        for found in there:
            saved: list[TrainedOn] = []
            notes: list[dict[str, Any]] = []

            counters = sharded.restore(found, self._ranks, self._engine, partial(self._check, saved, notes))
            if counters is not None:
                progress.go_on_from(counters)
                self.newest = progress.step
                if "loss_scale" in counters:
                    self._engine.loss_scale = LossScale(counters["loss_scale"], counters["loss_scale_good_steps"])
                progress.mean, progress.std = saved[0].mean, saved[0].std
                self._resume_order(progress, saved[0].order, counters["order_origin"], notes)
                self._origin = origin_of(found)
                say(f"going on from {self._store.url}/{found.name}" + ", without init_from" * bool(config.init_from))
                break
        else:
            if there:
                raise LatheError(f"no checkpoint of {self._store.url} can be read", "train into another output")
            self._origin = begin(config, self._ranks, self._engine)
        if gone := self._snapshots.resume(progress.step, self._texts(progress)):
            say(
                f"deleted {len(gone)} snapshots of averages later than step {progress.step}: their course was left"
                " behind"
            )

    def _check(self, saved: list[TrainedOn], notes: list[dict[str, Any]], found: checkpoint.Checkpoint) -> None:
        saved.append(check_resume(found, self._config, self._datasets))
        notes.extend(found.notes())

    def _resume_order(self, progress: Progress, order: str, origin: int, notes: Sequence[Mapping[str, Any]]) -> None:
        """Go on in the checkpoint's order, or begin that of other samples."""
        if order != self._datasets.identity:
            step = progress.order_origin = progress.step
            say(f"other samples than before: their order begins with step {step}; latents are whitened as before")
            return
        progress.order_origin = origin
        noted = {tuple(skip) for own in notes for skip in own["skipped_blocks"]}
        progress.skips = [list(skip) for skip in sorted(noted)]

    def save(self, progress: Progress, skipped_blocks: Sequence[Sequence[int]]) -> None:
        """Write a checkpoint of the step, unless there is one; all ranks call it at the same step.

        Args:
            progress: of the run.
            skipped_blocks: that this rank has met, see `LatentLoader.skipped`.

        Raises:
            StorageError: on the rank that could not write; LatheError on the others.
        """
        if self.newest == progress.step:
            return
        started = time.perf_counter()
        self._ranks.watch.note("saves")
        sharded.together(self._ranks, self._metrics.flush)
        scale = self._engine.loss_scale
        size = sharded.save(
            self._store,
            self._ranks,
            self._engine,
            step=progress.step,
            texts=self._texts(progress),
            counters={
                **progress.counters(),
                **({"loss_scale": scale.scale, "loss_scale_good_steps": scale.good_steps} if scale else {}),
            },
            notes={"skipped_blocks": skipped_blocks},
        )
        self.newest = progress.step
        keep, main = self._config.checkpoint.keep, self._ranks.is_main
        sharded.together(self._ranks, lambda: checkpoint.keep_newest(self._store, keep) if main else None)
        self._metrics.set("checkpoint_seconds", time.perf_counter() - started)
        self._metrics.set("checkpoint_bytes", size)
        self._metrics.set("checkpoint_step", progress.step)
        self._metrics.set("checkpoint_timestamp_seconds", time.time())

    def save_before_failing(self, progress: Progress, skipped_blocks: Sequence[Sequence[int]]) -> None:
        """Before a failure is told: the steps since the last checkpoint are not at fault, if they can be saved."""
        if self.newest == progress.step:
            return
        try:
            self.save(progress, skipped_blocks)
        except sharded.FAULTS as error:
            say(f"step {progress.step} could not be saved: {error}")
        else:
            say(f"saved step {progress.step}, the last one with whole data")

    def snapshot(self, progress: Progress) -> None:
        """Write a snapshot of the averages; all ranks call it at the same step. Raises as `save` does."""
        self._snapshots.save(progress.step, self._texts(progress))

    def _texts(self, progress: Progress) -> dict[str, bytes]:
        return {
            checkpoint.CONFIG: runfile.dump(self._config).encode(),
            checkpoint.ENGINE: checkpoint.as_json(self._engine_config),
            **({ORIGIN: checkpoint.as_json(self._origin)} if self._origin else {}),
            **files(self._datasets, progress.mean, progress.std),
        }
