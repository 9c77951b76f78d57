"""One rank of `lathe bench metrics`: the trainer in turns with and without metrics.

`python -m pipeline.operate.bench.metrics.rank JOB RESULT`, as `pipeline.operate.bench.train.rank`.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.config import TrainConfig, TrainMetricsConfig
from pipeline.operate.bench.train.loops import WholeTrainer
from pipeline.operate.bench.train.rank import main, timed
from pipeline.runtime.process import Process
from pipeline.train.reporting import Figures

_SCRAPES = 50


class _Silence:
    """In place of a trainer's `Reporter`: nothing is reduced over the ranks, logged, or told."""

    def start(self, step: int) -> None:
        """Nothing."""

    def begin(self, step: int, example: object) -> None:
        """Nothing."""

    def report(self, *_: object) -> Figures:
        """Nothing."""
        return Figures({}, 0.0)


def measure(config: TrainConfig, ranks: Process, job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and CPU seconds of a step in every turn, `on` and `off`.

    Args:
        config: the trainer's run file.
        ranks: this rank; all call it.
        job: `steps` of a turn, `pairs` of turns, and `warmup` steps before.
    """
    served = config.model_copy(update={"metrics": TrainMetricsConfig(peak_flops=1e12)})
    unserved = config.model_copy(
        update={"metrics": TrainMetricsConfig(prometheus=False), "output": f"{config.output}-off"}
    )
    on, off = WholeTrainer(served, ranks), WholeTrainer(unserved, ranks)
    off.trainer.levels, off.trainer.reporter = None, _Silence()  # type: ignore[assignment]
    address = on.trainer.metrics.address
    if not address:
        raise AssertionError("the metrics are not served")

    turns: dict[str, Callable[[int], None]] = {"on": on, "off": off}
    for turn in turns.values():
        turn(job["warmup"])
    rounds = []
    for number in range(job["pairs"]):
        order = ("on", "off") if number % 2 else ("off", "on")
        rounds.append({name: timed(turns[name], job["steps"], ranks) for name in order})
    return {
        "rounds": rounds,
        "scrape": timed(lambda times: _scrape(address, times), _SCRAPES, ranks),
        "parameters": on.parameters,
        "device": ranks.device.type,
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }


def _scrape(address: str, times: int) -> None:
    """Ask for the numbers as Prometheus does, in this process: what the asking takes is counted too."""
    for _ in range(times):
        with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310  (our own)
            answer.read()


if __name__ == "__main__":
    main(measure, *sys.argv[1:])
