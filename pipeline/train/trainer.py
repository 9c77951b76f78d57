"""The training loop: latents and captions to a text-to-image model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.console import ProgressTable, table
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.loader import LatentLoader
from pipeline.data.order import rank_positions
from pipeline.data.prepare import Scale
from pipeline.diffusion.loss import squared_error, weighted_mean
from pipeline.runtime import engine, process, requeue
from pipeline.runtime.process import Process
from pipeline.storage import Lease, Store, open_store
from pipeline.train import checkpoint, sharded, start
from pipeline.train.compatibility import check_alike
from pipeline.train.diagnosis import Suspects
from pipeline.train.examples import Examples
from pipeline.train.feed import Feed
from pipeline.train.interval import Interval
from pipeline.train.learning_rate import learning_rate
from pipeline.train.memory_advice import out_of_memory
from pipeline.train.network import build_network, start_from_pretrained
from pipeline.train.noise_levels import NoiseLevels
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from pipeline.train.preemption import StopRequest
from pipeline.train.progress import Progress
from pipeline.train.reporting import COLUMNS, Reporter, open_metrics
from pipeline.train.saves import Saves
from pipeline.train.snapshots import due
from pipeline.train.telling import conclusion, introduction, say
from pipeline.train.towers import load_online
from pipeline.train.validation import Validator


def fit(config: TrainConfig) -> None:
    """Train to `config.steps`, from the newest complete checkpoint of `config.output` on.

    Every rank calls it, as `launchers/accelerate.sh` does; without a launcher it is a world of one.

    Raises:
        ConfigError, DataError: run file, latents and checkpoint do not fit together.
        StorageError: latents cannot be read, or a checkpoint cannot be written.
        SetupError: the ranks or the engine are not what was asked for.
        LatheError: the loss is not finite any more.
        SystemExit: asked to stop by a signal, with 128 + its number, after a checkpoint.
    """
    requeue.clear()
    stopped_by = _fit(config)
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def _fit(config: TrainConfig) -> int:
    store = open_store(config.output)
    seen = start.conclusion_seen(store, config)
    if seen and process.is_alone():
        say(seen)
        return 0
    config, datasets = (config, None) if seen else start.open_data(config)
    ranks, lease = None, Lease(store, say)
    try:
        ranks = process.start(config.engine)
        if start.is_finished(seen, store, ranks):
            say(seen)
            return 0
        assert datasets is not None  # noqa: S101
        ranks.watch.note("starts")
        check_alike(config, datasets, ranks)
        sharded.together(ranks, lambda: lease.take() if ranks.is_main else None)
        return Trainer(config, ranks, datasets, store, lease).run()
    except (RuntimeError, MemoryError) as error:
        told = out_of_memory(error, config, ranks) or process.lost_rank(error, ranks)
        if told is None:
            raise
        if ranks is not None:
            ranks.abandon()
        raise told from error
    finally:
        lease.release()
        if ranks is not None:
            ranks.finish()


class Trainer:
    """One rank's part of a run: all of its state, and one step.

    Args:
        config: the run file.
        ranks: this rank among the others.
        datasets: the latents.
        store: the run's output.
        lease: rank 0's, of the output; None = nobody else writes there.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Process,
        datasets: DataSets,
        store: Store,
        lease: Lease | None = None,
    ) -> None:
        rank_positions(config.global_batch, ranks.rank, ranks.world_size)  # raises where the ranks do not fit
        share = engine.micro_batch(config.engine, config.global_batch, ranks.world_size)
        config, self.towers = load_online(config, datasets.manifests[0], ranks)
        self.config, self.ranks, self.datasets, self.store = config, ranks, datasets, store
        self.progress = Progress(*datasets.mean_and_std(config.normalisation))
        self.stopped_by, self.owes_checkpoint = 0, False
        torch.manual_seed(config.seed)
        self.model = build_network(config, datasets.manifests[0], self.towers)
        if config.unet.pretrained:
            start_from_pretrained(self.model, config.unet.pretrained, ranks, store)
        if config.engine.channels_last:
            self.model.use_channels_last()
        if config.engine.activation_checkpointing:
            self.model.checkpoint_activations()
        # now, since ZeRO-3 leaves each rank a part of them
        self.sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.named_children()}
        chosen = config.optimizer
        groups = parameter_groups(self.model, chosen.weight_decay, {"text.": chosen.text_learning_rate_ratio})
        self.engine = engine.build(
            ranks,
            self.model,
            AdamWithEMA(groups, chosen, config.ema.averages),
            config.engine,
            micro_batch=share,
            gradient_clip=chosen.gradient_clip,
        )
        self.metrics = open_metrics(config, ranks, store)
        self.reporter = Reporter(config, ranks, self.engine, self.metrics, datasets=datasets, towers=self.towers)
        self.levels: NoiseLevels | None = NoiseLevels(config, ranks.device)
        self.saves = Saves(
            store,
            ranks,
            self.engine,
            engine_config=self.engine.configuration,
            config=config,
            datasets=datasets,
            metrics=self.metrics,
            lease=lease,
        )

    def run(self) -> int:
        """Resume, then train to the last step. Returns the signal that asked to stop, or 0."""
        for _ in self.steps():
            pass
        return self.stopped_by

    def steps(self) -> Iterator[int]:
        """`run`, giving the number of every step once it is done. Closing it leaves no checkpoint behind."""
        config, progress = self.config, self.progress
        self.saves.resume(progress)
        self.reporter.start(progress)
        whitening = Scale("whiten", progress.mean, progress.std)
        self.examples = Examples(config, self.datasets, whitening, self.ranks.device, self.towers)
        self.suspects = Suspects(
            config, self.datasets, self.ranks, self.engine, step=progress.step, is_saved=lambda: self.saves.is_any
        )
        facts = introduction(config, self.sizes, self.datasets, self.ranks, self.engine, step=progress.step)
        say(table({**facts, "metrics": self.metrics.address or "not served", "output": self.store.url}))
        with StopRequest() as request:
            with (
                ProgressTable("train", "steps", COLUMNS, visible=self.ranks.is_main) as line,
                self._open_loader() as self.loader,
            ):
                self.validator = self._open_validator(whitening, request)
                left, saves = config.steps - progress.step, self.saves
                feed = Feed(self.loader, self.ranks, request, left, own=saves.flags, hear=saves.hear_or_finish)
                yield from self._train(feed, line)
                if feed.failed:
                    self.saves.save_before_failing(progress, self.loader.skipped)
                    feed.raise_failure()
                self.saves.finish()
            self.stopped_by = feed.stopped_by if progress.step < config.steps else 0
            where = f"{self.store.url}/{checkpoint.step_name(progress.step)}" if progress.step else ""
            if self.stopped_by:
                ask = partial(requeue.ask, step=progress.step, steps=config.steps, checkpoint=where)
                sharded.together(self.ranks, lambda: ask(stopped_by=self.stopped_by))  # once one leaves, all are ended
            self.metrics.close(stopped=bool(self.stopped_by), hurried=lambda: request.signal != 0)
            say(conclusion(where, progress.step, self.stopped_by))

    def _train(self, feed: Feed, line: ProgressTable) -> Iterator[int]:
        """Steps for as long as there are batches; the last one is saved, unless there are no more for a failure."""
        config, progress = self.config, self.progress
        interval = self.interval = Interval(self.ranks.device, self.levels)
        batch = feed.next()
        while batch is not None:
            started = time.perf_counter()
            loss = self.train_step(batch)
            self.owes_checkpoint |= progress.step % config.checkpoint.every == 0
            line.move(progress.step, config.steps)
            batch = feed.next()
            with self.saves.finished_first():
                self._learn_outcomes(wait=batch is None or self._is_told_or_saved())
                seconds = time.perf_counter() - started  # what the device took included
                interval.add(loss, feed.waited_seconds, feed.ranks_wait_seconds, seconds)
                self.saves.hear(feed.told, only_lease=batch is None)
            if progress.step % config.log_every == 0 or batch is None:
                started = time.perf_counter()
                figures, left = self.reporter.report(progress, interval, self.loader)
                line.row(progress.step, config.steps, figures, eta_seconds=left)
                interval = self.interval = Interval(self.ranks.device, self.levels, time.perf_counter() - started)
            if feed.failed:
                break
            with self.saves.finished_first():
                # while steps are skipped the weights may be what is broken: keep the checkpoint from before
                if (self.owes_checkpoint and not progress.skipped.in_a_row) or feed.is_over:
                    self.saves.save(progress, self.loader.skipped, last=feed.is_over)
                    self.owes_checkpoint = False
                if due(config, progress.step):  # a run that has no time left for it takes it when it is resumed
                    self.saves.snapshot(progress, last=feed.is_over)
            if self.validator and self.validator.due(progress.step) and not feed.stopped_by:
                self.ranks.watch.note("validates")
                self.validator.run(progress.step)
            yield progress.step

    def train_step(self, batch: Batch) -> Tensor:
        """Forward, backward, update of weights and average, on all ranks. Returns this rank's loss, on the device."""
        interval, losses = self.interval, []
        self.ranks.watch.note("computes", self.progress.step + 1)
        self.reporter.begin(self.progress.step + 1)
        with interval.waiting_for_ranks():
            share = self._share(batch)
        interval.begin()
        example = self.examples.of(batch, share)
        for micro in example.chunks(self.engine.accumulation):
            errors = squared_error(self.engine(*micro.inputs), micro.target)
            interval.hear(errors, micro.noise_level, micro.weight)
            losses.append(weighted_mean(errors, micro.weight))
            interval.mark("forward")
            self.engine.backward(losses[-1])
            interval.mark("backward")
        self.engine.step(learning_rate(self.progress.step, self.config.optimizer, self.config.steps))
        interval.mark("optimizer")
        self.progress.step += 1
        loss = torch.stack(losses).detach().mean()
        self.suspects.remember(batch, loss)
        self.reporter.end(example)
        return loss

    def _learn_outcomes(self, *, wait: bool) -> None:
        """Count the steps that were skipped; too many in a row are explained, and end the run."""
        told = self.engine.outcomes(wait=wait)
        self.suspects.look(told)
        self.progress.skipped.count(told)
        self.metrics.set("skipped_steps", self.progress.skipped.total)
        if self.progress.skipped.too_many:
            self.suspects.explain(self.progress.step)

    def _is_told_or_saved(self) -> bool:
        config, step = self.config, self.progress.step
        return step % config.log_every == 0 or self.owes_checkpoint or due(config, step)

    def _share(self, batch: Batch) -> float:
        """Of the global batch that counts; nobody is asked where nothing may be skipped."""
        if self.config.loader.on_damage == "fail" and not self.progress.skips:
            return 1.0
        with self.saves.finished_first():  # too many skipped samples are an error on all ranks
            return self.progress.counted.share(batch, self.ranks, self.config, self.datasets.samples)

    def _open_validator(self, scale: Scale, request: StopRequest) -> Validator | None:
        if self.config.validation.every is None:
            return None
        return Validator(
            self.config,
            self.ranks,
            self.engine,
            datasets=self.datasets,
            scale=scale,
            batch_size=self.config.global_batch // self.ranks.world_size // self.engine.accumulation,
            towers=self.towers,
            metrics=self.metrics,
            store=self.store,
            stopped=lambda: request.signal != 0,
        )

    def _open_loader(self) -> LatentLoader:
        config, progress = self.config, self.progress
        return LatentLoader(
            self.datasets,
            global_batch=config.global_batch,
            seed=config.seed,
            window=config.shuffle_window,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            origin=progress.order_origin,
            start_step=progress.step,
            skipped=progress.skips,
            config=config.loader,
        )
