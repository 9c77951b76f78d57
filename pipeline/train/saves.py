"""A run's checkpoints: the newest one is gone on from, new ones are saved, old ones retired."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.data.datasets import DataSets
from pipeline.data.threads import WorkerThreads
from pipeline.errors import LatheError
from pipeline.metrics import Metrics
from pipeline.runtime.engine import Engine, LossScale
from pipeline.runtime.process import Process
from pipeline.storage import Lease, Store
from pipeline.train import checkpoint, sharded
from pipeline.train.compatibility import check_resume
from pipeline.train.initial import ORIGIN, begin, origin_of
from pipeline.train.progress import Progress
from pipeline.train.run_notes import note_start
from pipeline.train.saver import Save, Saver
from pipeline.train.shelf import Shelf, newest_and_every
from pipeline.train.snapshots import Snapshots
from pipeline.train.telling import say
from pipeline.train.trained_on import TrainedOn, files


class Saves:
    """What a run leaves in its output: checkpoints, and snapshots of averages. Both are stored in the background.

    Args:
        store: the run's output.
        ranks: this rank among the others.
        engine: whose state is saved.
        engine_config: its whole configuration.
        config: the run file.
        datasets: the latents.
        metrics: told of each checkpoint, and made durable with it.
        lease: rank 0's, of the output, looked at before it is said that something is complete; None = there is none.
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
        lease: Lease | None,
    ) -> None:
        self._store, self._ranks, self._engine, self._metrics = store, ranks, engine, metrics
        self._engine_config, self._config, self._datasets, self._lease = engine_config, config, datasets, lease
        self._worker = WorkerThreads(1, "lathe-save")
        self._origin: dict[str, Any] | None = None

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
            self._origin = begin(config, self._datasets.manifests[0], self._ranks, self._engine)
        self._prepare(progress)
        if self._ranks.is_main:
            about = {"world_size": self._ranks.world_size, "engine": str(self._engine)}
            note_start(self._store, config, self._ranks.device, step=progress.step, **about)

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

    def _prepare(self, progress: Progress) -> None:
        """Clear what is left of other courses, and take the memory that state is copied to."""
        config, ranks, step = self._config, self._ranks, progress.step
        texts = {
            checkpoint.CONFIG: runfile.dump(config).encode(),
            checkpoint.ENGINE: checkpoint.as_json(self._engine_config),
            **({ORIGIN: checkpoint.as_json(self._origin)} if self._origin else {}),
            **files(self._datasets, progress.mean, progress.std),
        }
        shelf = Shelf(self._store, newest_and_every(config.checkpoint.keep, config.checkpoint.keep_every))
        sharded.together(ranks, lambda: shelf.open(step) if ranks.is_main else None)
        self._saver = Saver(
            self._store,
            ranks,
            self._engine,
            self._worker,
            shelf,
            texts=texts,
            limit=config.checkpoint.max_failures,
            before_marker=self._before_marker,
            when_done=self._report,
        )
        self._saver.newest = step
        self._savers = [self._saver]
        if config.ema.snapshot_every:
            self._take_snapshots(texts, step)

    def _take_snapshots(self, texts: Mapping[str, bytes], step: int) -> None:
        self._snapshots = Snapshots(
            self._store,
            self._ranks,
            self._engine,
            self._config,
            self._worker,
            texts=texts,
            step=step,
            check=self._check_output,
        )
        self._savers.append(self._snapshots.saver)
        if gone := self._snapshots.gone:
            say(f"deleted {len(gone)} snapshots of averages later than step {step}: their course was left behind")

    @property
    def is_any(self) -> bool:
        """Whether there is a checkpoint, or one on its way; the same on all ranks."""
        return self._saver.newest > 0

    def flags(self) -> tuple[int, ...]:
        """What this rank tells the others in each step of the saves that are on their way."""
        is_lost = self._lease is not None and self._lease.lost is not None
        return (is_lost, *(flag for saver in self._savers for flag in saver.flags))

    def hear(self, told: Sequence[int], *, only_lease: bool = False) -> None:
        """Go on with the saves that are on their way.

        Args:
            told: the largest that a rank has of each flag, the same on all ranks.
            only_lease: no step follows; what became of saves is heard by the last one, which is tried in any case.

        Raises:
            LatheError: a save failed, and it was one too many, or another run has taken the output over.
        """
        is_lost, *of_savers = told
        if is_lost:
            self._ranks.agree(self._lease.lost if self._lease is not None else None)
        for number, saver in enumerate(() if only_lease else self._savers):
            saver.hear(of_savers[3 * number : 3 * number + 3])
        self._metrics.note("checkpoint_failures", sum(saver.failures for saver in self._savers))

    def hear_or_finish(self, told: Sequence[int]) -> None:
        """`hear`; where it raises, what is on its way is finished first."""
        with self.finished_first():
            self.hear(told)

    def save(self, progress: Progress, skipped_blocks: Sequence[Sequence[int]], *, last: bool = False) -> None:
        """Begin a checkpoint of the step, unless there is one; all ranks call it at the same step.

        Args:
            progress: of the run.
            skipped_blocks: that this rank has met, see `LatentLoader.skipped`.
            last: see `Saver.begin`.

        Raises:
            LatheError: the one before failed, and it was one too many.
        """
        if self._saver.newest == progress.step:
            return
        started = time.perf_counter()
        self._ranks.watch.note("saves")
        scale = self._engine.loss_scale
        loss_scale = {"loss_scale": scale.scale, "loss_scale_good_steps": scale.good_steps} if scale else {}
        notes = {"skipped_blocks": [list(block) for block in skipped_blocks]}
        self._saver.begin(progress.step, counters={**progress.counters(), **loss_scale}, notes=notes, last=last)
        self._metrics.note("checkpoint_stall_seconds", time.perf_counter() - started)

    def save_before_failing(self, progress: Progress, skipped_blocks: Sequence[Sequence[int]]) -> None:
        """Before a failure is told: the steps since the last checkpoint are not at fault, if they can be saved."""
        is_new = self._saver.newest != progress.step
        try:
            self.save(progress, skipped_blocks, last=True)
            self.finish()
        except sharded.FAULTS as error:
            say(f"step {progress.step} could not be saved: {error}")
        else:
            if is_new:
                say(f"saved step {progress.step}, the last one with whole data")

    def snapshot(self, progress: Progress, *, last: bool = False) -> None:
        """Begin a snapshot of the averages; all ranks call it at the same step. `last` and errors as of `save`."""
        self._snapshots.take(progress.step, last=last)

    def finish(self) -> None:
        """Wait for what is on its way; there are no more steps. Raises LatheError where it fails."""
        self._ranks.watch.note("saves")
        problem: Exception | None = None
        for saver in self._savers:
            try:
                # a snapshot of an earlier step may fail as ever: the run's end does not hang on it
                saver.settle(last=saver.newest == self._saver.newest)
            except Exception as error:
                if not isinstance(error, sharded.FAULTS) and error is not saver.problem:
                    raise  # others may be lost: nothing can be waited for
                problem = problem or error
        if problem is not None:
            raise problem

    @contextmanager
    def finished_first(self) -> Iterator[None]:
        """Where all ranks raise an error inside, saves and log are finished before the error goes on."""
        try:
            yield
        except LatheError:
            with suppress(*sharded.FAULTS):
                self.finish()
            with suppress(LatheError):
                self._keep_log()
            raise

    def _check_output(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _keep_log(self) -> None:
        if self._ranks.is_main:
            self._check_output()  # it is another run's log, if this one has lost the output
            self._metrics.flush()

    def _before_marker(self) -> None:
        self._keep_log()
        self._check_output()

    def _report(self, save: Save) -> None:
        self._metrics.note("checkpoint_seconds", save.seconds)
        self._metrics.set("checkpoint_bytes", save.size)
        self._metrics.set("checkpoint_step", save.step)
        self._metrics.set("checkpoint_timestamp_seconds", save.taken)
