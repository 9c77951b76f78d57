"""What is told of each interval of steps: metrics, their log, and a row of figures for a person."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from pipeline.config import TrainConfig
from pipeline.data.datasets import DataSets
from pipeline.data.loader import LatentLoader
from pipeline.errors import StorageError
from pipeline.metrics import Metrics, Place, Value
from pipeline.models.conditioning import FrozenTowers
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store, counters
from pipeline.train.ema_profiles import decay_at
from pipeline.train.examples import Example
from pipeline.train.interval import Interval
from pipeline.train.learning_rate import learning_rate
from pipeline.train.model_flops import device_peak, step_flops
from pipeline.train.progress import Progress
from pipeline.train.speed import memory, speed
from pipeline.train.spikes import Spikes
from pipeline.train.telling import say

COLUMNS = {"loss": 8, "rate": 8, "norm": 8, "images/s": 8, "wait": 4, "epoch": 7}
"""Figures that a person follows, and how wide they are: 76 columns with steps and time left. `rate` is of learning,
`norm` of the gradient, `wait` the share of the time that steps waited for data."""


class Figures(NamedTuple):
    """Of an interval."""

    by_column: dict[str, str]
    left_seconds: float  # until the run is finished, as this start's pace has it


def open_metrics(config: TrainConfig, ranks: Process, store: Store) -> Metrics:
    """This rank's. Raises as `Metrics`."""
    return Metrics(
        config.metrics,
        "train",
        Place(config.output, ranks.rank, ranks.world_size, int(os.environ["LOCAL_RANK"])),
        log_store=store,
        about=config.model_dump(mode="json"),
        traffic=counters,
    )


class Reporter:
    """Reports of one run.

    Args:
        config: the run file.
        ranks: this rank among the others.
        engine: that trains.
        metrics: where numbers go.
        datasets: that it is trained on.
        towers: the network's frozen ones; None = none run while training.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Process,
        engine: Engine,
        metrics: Metrics,
        *,
        datasets: DataSets,
        towers: FrozenTowers | None = None,
    ) -> None:
        self._config, self._ranks, self._engine, self._metrics = config, ranks, engine, metrics
        self._datasets, self._towers = datasets, towers
        self._watched = {"loss": Spikes(), "gradient_norm": Spikes()}
        self._spikes = self._restarts = 0
        self._started, self._first_step = time.monotonic(), 0
        self._peak_flops = device_peak(config, ranks) if ranks.is_main else None
        self._step_flops: float | None = None  # of one rank; counted in the first step

    def start(self, progress: Progress) -> None:
        """Before the first step of this start. What lines of the log bring late is told: alerts compare with it."""
        step, scale = progress.step, self._engine.loss_scale
        self._started, self._first_step = time.monotonic(), step
        self._restarts = self._metrics.resume(step)
        self._metrics.log(
            step,
            {
                "restarts": self._restarts,
                "world_size": self._ranks.world_size,
                "target_steps": self._config.steps,
            },
        )
        self._metrics.set("step", step)
        self._metrics.set("skipped_steps", progress.skipped.total)
        self._metrics.set("checkpoint_step", step)  # where there is none, a run begins with 0
        if scale is not None:
            self._metrics.set("loss_scale", scale.scale)
        with suppress(StorageError):  # a later line brings it
            self._metrics.flush()

    def begin(self, step: int) -> None:
        """This rank begins a step."""
        self._metrics.set("rank_step", step)
        self._metrics.set("rank_last_step_timestamp_seconds", time.time())

    def end(self, example: Example) -> None:
        """A step is done, of this example: the first one's operations are counted, outside the step's parts."""
        self._metrics.set("last_step_timestamp_seconds", time.time())
        if self._peak_flops is not None and self._step_flops is None:
            manifest = self._datasets.manifests[0]
            self._step_flops = step_flops(self._config, manifest, self._towers, example.inputs)

    def report(self, progress: Progress, interval: Interval, loader: LatentLoader) -> Figures:
        """Log the interval on rank 0, after a reduction over all."""
        config, step = self._config, progress.step
        parts = interval.parts()
        totals = interval.reduced(self._ranks, parts)
        values: dict[str, Value] = {
            "loss": totals.loss,
            **({"noise_level_loss": totals.level_losses} if totals.level_losses else {}),
            **self._learning(step),
            **speed(config, interval, parts, totals.ranks),
            **self._mfu(interval),
            "epoch": (step - progress.order_origin) * config.global_batch / self._datasets.samples,
            "samples_seen": step * config.global_batch,
            "skipped_steps": progress.skipped.total,
            "skipped_blocks": len(loader.skipped),
            "world_size": self._ranks.world_size,
            "restarts": self._restarts,
            **memory(self._ranks.device),
        }
        told = self._judge(values)
        self._metrics.log(step, {**values, "spikes": self._spikes})
        self._metrics.set("step", step)
        own = totals.ranks[self._ranks.rank]
        self._metrics.set("rank_data_wait_seconds", own.wait)
        self._metrics.set("rank_forward_backward_seconds", own.forward_backward)
        if told:
            say(f"step {step}: {'; '.join(told)}")
        pace = (time.monotonic() - self._started) / (step - self._first_step)
        return Figures(_by_column(values), pace * (config.steps - step))

    def _learning(self, step: int) -> dict[str, Value]:
        """Of the last step."""
        config, updates, scale = self._config, self._engine.optimizer.updates, self._engine.loss_scale
        decays = {one.name: decay_at(one, updates) for one in config.ema.averages} if updates else {}
        return {
            "learning_rate": learning_rate(step - 1, config.optimizer, config.steps),
            "gradient_norm": self._engine.gradient_norm(),
            **({"ema_decay": decays} if decays else {}),
            **({"loss_scale": scale.scale} if scale is not None else {}),
        }

    def _mfu(self, interval: Interval) -> dict[str, float]:
        """The share of the device's peak, where that is known."""
        if self._peak_flops is None or not self._step_flops:
            return {}
        return {"mfu_ratio": self._step_flops * interval.steps / interval.seconds / self._peak_flops}

    def _judge(self, values: Mapping[str, Value]) -> list[str]:
        """What of loss and gradient is far beyond the usual, in words; it is counted."""
        usual = {name: spikes.judge(_number(values, name)) for name, spikes in self._watched.items()}
        told = [
            f"{name.replace('_', ' ')} {values[name]:.3g}, usually {middle:.3g}"
            for name, middle in usual.items()
            if middle is not None
        ]
        self._spikes += len(told)
        return told


def _number(values: Mapping[str, Value], name: str) -> float:
    value = values[name]
    assert isinstance(value, int | float)  # noqa: S101
    return value


def _by_column(values: Mapping[str, Value]) -> dict[str, str]:
    wait = _number(values, "data_wait_seconds") / _number(values, "step_seconds")
    return {
        "loss": f"{values['loss']:.4f}",
        "rate": f"{values['learning_rate']:.2e}",
        "norm": f"{values['gradient_norm']:.3g}",
        "images/s": f"{values['images_per_second']:.0f}",
        "wait": f"{wait:.0%}",
        "epoch": f"{values['epoch']:.2f}",
    }
