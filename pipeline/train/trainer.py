"""The training loop: latents and captions to a text-to-image model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.console import ProgressLine, table
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.data.order import rank_positions
from pipeline.data.prepare import Scale
from pipeline.diffusion.loss import weighted_loss
from pipeline.errors import LatheError
from pipeline.metrics import Metrics
from pipeline.models import unet
from pipeline.models.text import TextTower
from pipeline.models.unet import TextToImage
from pipeline.runtime import engine, process
from pipeline.runtime.engine import LossScale
from pipeline.runtime.process import Process
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint, sharded
from pipeline.train.compatibility import check_alike, check_data, check_resume
from pipeline.train.examples import Counted, Example, Examples
from pipeline.train.feed import Feed
from pipeline.train.interval import Interval
from pipeline.train.learning_rate import learning_rate
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from pipeline.train.preemption import StopRequest
from pipeline.train.skipped_steps import SkippedSteps
from pipeline.train.snapshots import Snapshots, due, is_missing
from pipeline.train.telling import conclusion, introduction, say
from pipeline.train.trained_on import TrainedOn, files


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
    stopped_by = _fit(config)
    if stopped_by:
        raise SystemExit(128 + stopped_by)


def _fit(config: TrainConfig) -> int:
    store = open_store(config.output)
    finished = [c for c in checkpoint.find(store, warn=False) if c.step >= config.steps]
    if finished and not is_missing(store, config, finished[0].step):
        say(f"finished already: {store.url}/{finished[0].name} has all {config.steps} steps")
        return 0
    with ProgressLine("data", "receipts", visible=os.environ.get("RANK", "0") == "0") as line:
        datasets = open_datasets(
            config.sources, global_batch=config.global_batch, mixing=config.loader.mixing, progress=line.update
        )
    for manifest in datasets.manifests:
        check_data(config, manifest)
    ranks = None
    try:
        ranks = process.start(config.engine)
        check_alike(config, datasets, ranks)
        return Trainer(config, ranks, datasets, store).run()
    except RuntimeError as error:
        lost = process.lost_rank(error)
        if lost is None:
            raise
        raise lost from error
    finally:
        if ranks is not None:
            ranks.finish()


def engine_configuration(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """The engine's whole configuration, DeepSpeed's own for ZeRO; checked, on any machine.

    Raises:
        ConfigError: it cannot work.
    """
    clip = config.optimizer.gradient_clip
    return engine.describe(config.engine, global_batch=config.global_batch, gradient_clip=clip, world_size=ranks)


class Trainer:
    """One rank's part of a run: all of its state, and one step.

    Args:
        config: the run file.
        ranks: this rank among the others.
        datasets: the latents.
        store: the run's output.
    """

    def __init__(self, config: TrainConfig, ranks: Process, datasets: DataSets, store: Store) -> None:
        self.config, self.ranks, self.datasets, self.store = config, ranks, datasets, store
        self.step = 0  # optimizer steps done, skipped ones included
        self.order_origin = 0  # the step with which the samples' order began
        self.skips: list[list[int]] = []  # blocks of latents that no rank counts, as of the last restart
        self.counted = Counted()
        self.mean, self.std = datasets.mean, datasets.std  # latents are whitened by these to the last step
        self.skipped = SkippedSteps()
        self.saved_step = 0
        rank_positions(config.global_batch, ranks.rank, ranks.world_size)  # raises where the ranks do not fit
        self.engine_config = engine_configuration(config, ranks.world_size)
        manifest = datasets.manifests[0]
        torch.manual_seed(config.seed)
        network = unet.build(config.unet, manifest.latent_channels, manifest.latent_side, config.text.width)
        self.model = TextToImage(network, TextTower(config.text))
        if config.engine.channels_last:
            self.model.use_channels_last()
        if config.engine.activation_checkpointing:
            self.model.checkpoint_activations()
        # now, since ZeRO-3 leaves each rank a part of them
        self.sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.named_children()}
        chosen = config.optimizer
        groups = parameter_groups(self.model, chosen.weight_decay, {"text.": chosen.text_learning_rate_ratio})
        optimizer = AdamWithEMA(groups, chosen, config.ema.averages)
        self.engine = engine.build(
            ranks,
            self.model,
            optimizer,
            config.engine,
            micro_batch=self.engine_config["train_micro_batch_size_per_gpu"],
            gradient_clip=chosen.gradient_clip,
        )
        self.snapshots = Snapshots(store, ranks, self.engine, config)
        self.metrics = Metrics(config.metrics, "train", ranks.rank, store)

    def run(self) -> int:
        """Resume, then train to the last step. Returns the signal that asked to stop, or 0."""
        config = self.config
        self._resume()
        self.examples = Examples(config, self.datasets, Scale("whiten", self.mean, self.std), self.ranks.device)
        self._introduce()
        with (
            StopRequest() as request,
            ProgressLine("train", "steps", visible=self.ranks.is_main) as line,
            self._open_loader() as self.loader,
        ):
            feed = Feed(self.loader, self.ranks, request, config.steps - self.step)
            self._train(feed, line)
            if feed.failed:
                self._save_what_was_done()
                feed.raise_failure()
        self.metrics.close()
        stop = feed.stopped_by if self.step < config.steps else 0
        say(conclusion(f"{self.store.url}/{checkpoint.step_name(self.step)}", self.step, stop))
        return stop

    def _train(self, feed: Feed, line: ProgressLine) -> None:
        """Steps for as long as there are batches; the last one is saved, unless there are no more for a failure."""
        config, interval = self.config, Interval.start(self.ranks.device)
        batch = feed.next()
        while batch is not None:
            started = time.perf_counter()
            loss = self.train_step(batch)
            batch = feed.next()
            interval.add(loss, feed.waited_seconds, time.perf_counter() - started)
            told = self.engine.outcomes(wait=batch is None or self._is_told_or_saved())
            self.skipped.count(told, self.step)
            if self.step % config.log_every == 0 or batch is None:
                line.update(self.step, config.steps, self._report(interval))
                interval = Interval.start(self.ranks.device)
            if feed.failed:
                break
            # while steps are skipped the weights may be what is broken: keep the checkpoint from before
            if (self.step % config.checkpoint.every == 0 and not self.skipped.in_a_row) or feed.is_over:
                self._save()
            if due(config, self.step):  # a run that has no time left for it takes it when it is resumed
                self.snapshots.save(self.step, self._checkpoint_texts())

    def _save_what_was_done(self) -> None:
        """Before a failure is told: the steps since the last checkpoint are not at fault, if they can be saved."""
        if self.saved_step == self.step:
            return
        try:
            self._save()
        except sharded.FAULTS as error:
            say(f"step {self.step} could not be saved: {error}")
        else:
            say(f"saved step {self.step}, the last one with whole data")

    def train_step(self, batch: Batch) -> Tensor:
        """Forward, backward, update of weights and average, on all ranks. Returns this rank's loss, on the device."""
        example = self.examples.of(batch, self._share(batch))
        losses = []
        for parts in zip(*(part.chunk(self.engine.accumulation) for part in example), strict=True):
            micro = Example(*parts)
            prediction = self.engine(micro.noisy, micro.timestep, micro.tokens)
            losses.append(weighted_loss(prediction, micro.target, micro.weight))
            self.engine.backward(losses[-1])
        self.engine.step(learning_rate(self.step, self.config.optimizer, self.config.steps))
        self.step += 1
        return torch.stack(losses).detach().mean()

    def _is_told_or_saved(self) -> bool:
        config = self.config
        return self.step % config.log_every == 0 or self.step % config.checkpoint.every == 0 or due(config, self.step)

    def _share(self, batch: Batch) -> float:
        """Of the global batch that counts; nobody is asked where nothing may be skipped."""
        if self.config.loader.on_damage == "fail" and not self.skips:
            return 1.0
        return self.counted.share(batch, self.ranks, self.config, self.datasets.samples)

    def _open_loader(self) -> LatentLoader:
        config = self.config
        return LatentLoader(
            self.datasets,
            global_batch=config.global_batch,
            seed=config.seed,
            window=config.shuffle_window,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            origin=self.order_origin,
            start_step=self.step,
            skipped=self.skips,
            config=config.loader,
        )

    def _resume(self) -> None:
        """Load the newest checkpoint that is whole; a damaged one is passed over, and one rank says so."""
        there = checkpoint.find(self.store, warn=self.ranks.is_main)
        for found in there:
            saved: list[TrainedOn] = []
            notes: list[dict[str, Any]] = []

            counters = sharded.restore(found, self.ranks, self.engine, partial(self._check, saved, notes))
            if counters is not None:
                self.step = self.saved_step = counters["step"]
                self.skipped = SkippedSteps(counters["skipped"])
                if "loss_scale" in counters:
                    self.engine.loss_scale = LossScale(counters["loss_scale"], counters["loss_scale_good_steps"])
                self.counted = Counted(counters["drawn"], counters["drawn_in_vain"])
                self.mean, self.std = saved[0].mean, saved[0].std
                self._resume_order(saved[0].order, counters["order_origin"], notes)
                say(f"going on from {self.store.url}/{found.name}")
                break
        else:
            if there:
                raise LatheError(f"no checkpoint of {self.store.url} can be read", "train into another output")
        if gone := self.snapshots.resume(self.step, self._checkpoint_texts()):
            say(f"deleted {len(gone)} snapshots of averages later than step {self.step}: their course was left behind")
        self.metrics.resume(self.step)

    def _check(self, saved: list[TrainedOn], notes: list[dict[str, Any]], found: checkpoint.Checkpoint) -> None:
        saved.append(check_resume(found, self.config, self.datasets))
        notes.extend(found.notes())

    def _resume_order(self, order: str, origin: int, notes: Sequence[Mapping[str, Any]]) -> None:
        """Go on in the checkpoint's order, or begin that of other samples."""
        if order != self.datasets.identity:
            self.order_origin = self.step
            say(f"other samples than before: their order begins with step {self.step}; latents are whitened as before")
            return
        self.order_origin = origin
        noted = {tuple(skip) for own in notes for skip in own["skipped_blocks"]}
        self.skips = [list(skip) for skip in sorted(noted)]

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        started = time.perf_counter()
        sharded.together(self.ranks, self.metrics.flush)
        scale = self.engine.loss_scale
        size = sharded.save(
            self.store,
            self.ranks,
            self.engine,
            step=self.step,
            texts=self._checkpoint_texts(),
            counters={
                "skipped": self.skipped.total,
                "order_origin": self.order_origin,
                "drawn": self.counted.drawn,
                "drawn_in_vain": self.counted.in_vain,
                **({"loss_scale": scale.scale, "loss_scale_good_steps": scale.good_steps} if scale else {}),
            },
            notes={"skipped_blocks": self.loader.skipped},
        )
        self.saved_step = self.step
        keep, main = self.config.checkpoint.keep, self.ranks.is_main
        sharded.together(self.ranks, lambda: checkpoint.keep_newest(self.store, keep) if main else None)
        self.metrics.set("checkpoint_seconds", time.perf_counter() - started)
        self.metrics.set("checkpoint_bytes", size)
        self.metrics.set("checkpoint_step", self.step)
        self.metrics.set("checkpoint_timestamp_seconds", time.time())

    def _checkpoint_texts(self) -> dict[str, bytes]:
        return {
            checkpoint.CONFIG: runfile.dump(self.config).encode(),
            checkpoint.ENGINE: checkpoint.as_json(self.engine_config),
            **files(self.datasets, self.mean, self.std),
        }

    def _report(self, interval: Interval) -> str:
        """Log the interval on rank 0, after a reduction over all; returns a few words for the progress line."""
        total, count = self.ranks.sum(interval.loss).tolist()
        samples = self.step * self.config.global_batch
        values = {
            "loss": total / count if count else float("nan"),
            "learning_rate": learning_rate(self.step - 1, self.config.optimizer, self.config.steps),
            "gradient_norm": self.engine.gradient_norm(),
            "images_per_second": interval.steps * self.config.global_batch / interval.seconds,
            "step_seconds": interval.seconds / interval.steps,
            "data_wait_seconds": interval.wait_seconds / interval.steps,
            "epoch": (self.step - self.order_origin) * self.config.global_batch / self.datasets.samples,
            "samples_seen": samples,
            "skipped_steps": self.skipped.total,
            "skipped_blocks": len(self.loader.skipped),
            "resident_memory_bytes": psutil.Process().memory_info().rss,
        }
        self.metrics.log(self.step, values)
        self.metrics.set("step", self.step)
        self.metrics.set("last_step_timestamp_seconds", time.time())
        return f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s"

    def _introduce(self) -> None:
        self.metrics.set("world_size", self.ranks.world_size)
        self.metrics.set("target_steps", self.config.steps)
        self.metrics.set("step", self.step)
        facts = introduction(self.config, self.sizes, self.datasets, self.ranks, self.engine, step=self.step)
        say(table({**facts, "metrics": self.metrics.address or "not served", "output": self.store.url}))
