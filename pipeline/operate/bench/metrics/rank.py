"""One rank of `lathe bench metrics`: steps of the trainer with and without metrics, one by one.

`python -m pipeline.operate.bench.metrics.rank JOB RESULT`, as `pipeline.operate.bench.train.rank`.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import TrainConfig, TrainMetricsConfig
from pipeline.data.loader import LatentLoader
from pipeline.operate.bench.train.loops import WholeTrainer
from pipeline.operate.bench.train.rank import main, timed
from pipeline.runtime.process import Process
from pipeline.train.examples import Example
from pipeline.train.interval import Interval
from pipeline.train.progress import Progress
from pipeline.train.reporting import Figures, Reporter

_SCRAPES = 50


class _Silence(Reporter):
    """Nothing is reduced over the ranks, logged, or told."""

    def __init__(self) -> None:
        pass

    def start(self, progress: Progress) -> None:
        """Nothing."""

    def begin(self, step: int) -> None:
        """Nothing."""

    def end(self, example: Example) -> None:
        """Nothing."""

    def report(self, progress: Progress, interval: Interval, loader: LatentLoader) -> Figures:
        """Nothing."""
        return Figures({}, 0.0)


def measure(config: TrainConfig, ranks: Process, job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and CPU seconds of a step in every round, `on` and `off`.

    Args:
        config: the trainer's run file.
        ranks: this rank; all call it.
        job: `pairs`, rounds of so many `steps` of each; and `warmup` steps before.
    """
    served = config.model_copy(update={"metrics": TrainMetricsConfig(peak_flops=1e12)})
    unserved = config.model_copy(
        update={"metrics": TrainMetricsConfig(prometheus=False), "output": f"{config.output}-off"}
    )
    on, off = WholeTrainer(served, ranks), WholeTrainer(unserved, ranks)
    off.trainer.levels, off.trainer.reporter = None, _Silence()
    address = on.trainer.metrics.address
    if not address:
        raise AssertionError("the metrics are not served")

    turns: dict[str, WholeTrainer] = {"on": on, "off": off}
    for turn in turns.values():
        turn(job["warmup"])
    return {
        "rounds": [_round(turns, job["steps"], ranks) for _ in range(job["pairs"])],
        "scrape": timed(lambda times: _scrape(address, times), _SCRAPES, ranks),
        "parameters": on.parameters,
        "device": ranks.device.type,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }


def _round(turns: dict[str, WholeTrainer], steps: int, ranks: Process) -> dict[str, dict[str, float]]:
    """Means of so many steps of each, which alternate one by one: what slows the machine down meets both."""
    found = {name: {"seconds": 0.0, "cpu_seconds": 0.0} for name in turns}
    for step in range(steps):
        for name in turns if step % 2 else reversed(turns):
            for figure, value in timed(turns[name], 1, ranks).items():
                found[name][figure] += value / steps
    return found


def _scrape(address: str, times: int) -> None:
    """Ask for the numbers as Prometheus does, in this process: what the asking takes is counted too."""
    for _ in range(times):
        with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310  (our own)
            answer.read()


if __name__ == "__main__":
    main(measure, *sys.argv[1:])
