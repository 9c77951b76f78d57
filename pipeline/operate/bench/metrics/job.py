"""`lathe bench metrics`: what it costs a step to be told of.

One process has two trainers of the same network and data, one as it comes, one that measures, reduces, logs and serves
nothing. They take turns step by step, so that a noisy neighbour meets both; a round is of 20 steps of each, with one
line of the log, as often as by default.
(a) Steps of about a tenth of a second: their ratio, round by round.
(b) The shortest steps there are: added CPU time, likewise.
Scrapes, which come every 15 s or so, are measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.operate.bench.setting import setting
from pipeline.operate.bench.train.bench import PACKAGES, interval, measure_both
from pipeline.operate.bench.train.sizes import REFERENCE, TINY, Pairs, TrainBench

RANK = "pipeline.operate.bench.metrics.rank"
_LOG_EVERY = 20  # by default
_ALONE = {**TINY, "engine": {"threads_per_rank": 1}}  # threads that spin while they wait would be counted too

SIZES = {
    "small": TrainBench(
        zero_stage=0,
        samples=512,
        reference=Pairs(_ALONE, batch=8, steps=_LOG_EVERY, pairs=6, warmup=4),
        tiny=Pairs(_ALONE, batch=1, steps=_LOG_EVERY, pairs=10, warmup=5),
    ),
    "standard": TrainBench(
        zero_stage=0,
        samples=2048,
        reference=Pairs(_ALONE, batch=8, steps=_LOG_EVERY, pairs=60, warmup=8),
        tiny=Pairs(_ALONE, batch=1, steps=_LOG_EVERY, pairs=100, warmup=20),
    ),
    "large": TrainBench(
        zero_stage=0,
        samples=16_384,
        reference=Pairs(REFERENCE, batch=64, steps=_LOG_EVERY, pairs=100, warmup=10),
        tiny=Pairs(_ALONE, batch=1, steps=_LOG_EVERY, pairs=200, warmup=50),
    ),
}


def sized(name: str, *, repeats: int | None = None, ranks: int = 1) -> TrainBench:
    """The benchmark of one of SIZES, with that many pairs. Raises ConfigError where there is none of that name."""
    if name not in SIZES:
        raise ConfigError(f"--size {name}: unknown", f"use one of {', '.join(SIZES)}")
    bench = replace(SIZES[name], ranks=ranks)
    pairs = repeats or bench.reference.pairs
    tiny = repeats or bench.tiny.pairs
    return replace(bench, reference=replace(bench.reference, pairs=pairs), tiny=replace(bench.tiny, pairs=tiny))


def bench_metrics(bench: TrainBench, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Every figure of the benchmark, with the machine and the sizes.

    Raises:
        SetupError: a rank failed.
    """
    about = setting(PACKAGES)  # before there is any load of our own
    found = measure_both(bench, say, "rounds of {} steps with and without metrics", RANK)
    ratio, added = over(found["reference"]["rounds"]), added_milliseconds(found["tiny"]["rounds"])
    return {
        "bench": "metrics",
        "metrics_on_over_off": ratio["median"],
        "metrics_on_over_off_interval": [ratio["low"], ratio["high"]],
        "metrics_ms_per_step": added["median"],
        "metrics_ms_per_step_interval": [added["low"], added["high"]],
        "scrape_ms": 1e3 * found["tiny"]["scrape"]["cpu_seconds"],
        **found,
        "sizes": asdict(bench),
        "setting": about,
    }


Rounds = Sequence[Mapping[str, Mapping[str, float]]]


def over(rounds: Rounds) -> dict[str, float]:
    """Seconds of a step with metrics over those without: the median of rounds, and its interval."""
    return interval([turns["on"]["seconds"] / turns["off"]["seconds"] for turns in rounds])


def added_milliseconds(rounds: Rounds) -> dict[str, float]:
    """CPU time that metrics add to a step, all threads of a rank, likewise."""
    return interval([1e3 * (turns["on"]["cpu_seconds"] - turns["off"]["cpu_seconds"]) for turns in rounds])
