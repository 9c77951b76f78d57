"""What is told of each interval of steps: metrics, their log, and a row of figures for a person."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from pipeline.config import TrainConfig
from pipeline.data.loader import LatentLoader
from pipeline.metrics import Metrics
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.train.interval import Interval
from pipeline.train.learning_rate import learning_rate
from pipeline.train.progress import Progress
from pipeline.train.spikes import Spikes
from pipeline.train.telling import say

COLUMNS = {"loss": 8, "rate": 8, "norm": 8, "images/s": 8, "wait": 4, "epoch": 7}
"""Figures that a person follows, and how wide they are: 76 columns with steps and time left. `rate` is of learning,
`norm` of the gradient, `wait` the share of the time that steps waited for data."""


class Figures(NamedTuple):
    """Of an interval."""

    by_column: dict[str, str]
    left_seconds: float  # until the run is finished, as this start's pace has it


class Reporter:
    """Reports of one run.

    Args:
        config: the run file.
        ranks: this rank among the others.
        engine: that trains.
        metrics: where numbers go.
        samples: of the data sets.
    """

    def __init__(self, config: TrainConfig, ranks: Process, engine: Engine, metrics: Metrics, *, samples: int) -> None:
        self._config, self._ranks, self._engine, self._metrics = config, ranks, engine, metrics
        self._samples = samples
        self._watched = {"loss": Spikes(), "gradient_norm": Spikes()}
        self._spikes = 0
        self._started, self._first_step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """Before the first step of this start; `step` were done before."""
        self._started, self._first_step = time.monotonic(), step
        self._metrics.resume(step)
        self._metrics.set("world_size", self._ranks.world_size)
        self._metrics.set("target_steps", self._config.steps)
        self._metrics.set("step", step)

    def report(self, progress: Progress, interval: Interval, loader: LatentLoader) -> Figures:
        """Log the interval on rank 0, after a reduction over all."""
        config, step = self._config, progress.step
        total, count = self._ranks.sum(interval.loss).tolist()
        values = {
            "loss": total / count if count else float("nan"),
            "learning_rate": learning_rate(step - 1, config.optimizer, config.steps),
            "gradient_norm": self._engine.gradient_norm(),
            "images_per_second": interval.steps * config.global_batch / interval.seconds,
            "step_seconds": interval.seconds / interval.steps,
            "data_wait_seconds": interval.wait_seconds / interval.steps,
            "epoch": (step - progress.order_origin) * config.global_batch / self._samples,
            "samples_seen": step * config.global_batch,
            "skipped_steps": progress.skipped.total,
            "skipped_blocks": len(loader.skipped),
            "resident_memory_bytes": psutil.Process().memory_info().rss,
        }
        usual = {name: spikes.judge(values[name]) for name, spikes in self._watched.items()}
        told = [
            f"{name.replace('_', ' ')} {values[name]:.3g}, usually {middle:.3g}"
            for name, middle in usual.items()
            if middle is not None
        ]
        self._spikes += len(told)
        values["spikes"] = self._spikes
        self._metrics.log(step, values)
        self._metrics.set("step", step)
        self._metrics.set("last_step_timestamp_seconds", time.time())
        if told:
            say(f"step {step}: {'; '.join(told)}")
        pace = (time.monotonic() - self._started) / (step - self._first_step)
        return Figures(_by_column(values), pace * (config.steps - step))


def _by_column(values: Mapping[str, float]) -> dict[str, str]:
    return {
        "loss": f"{values['loss']:.4f}",
        "rate": f"{values['learning_rate']:.2e}",
        "norm": f"{values['gradient_norm']:.3g}",
        "images/s": f"{values['images_per_second']:.0f}",
        "wait": f"{values['data_wait_seconds'] / values['step_seconds']:.0%}",
        "epoch": f"{values['epoch']:.2f}",
    }
