"""`lathe bench metrics`: every figure follows from what was measured, and the trainer without metrics has none."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.operate.bench.metrics import job
from pipeline.operate.bench.metrics.job import added_milliseconds, bench_metrics, over, sized
from pipeline.operate.bench.metrics.page import page, summary
from pipeline.operate.bench.train.sizes import TINY, Pairs, TrainBench


def rounds(*pairs: tuple[float, float]) -> list[dict[str, dict[str, float]]]:
    return [
        {"on": {"seconds": on, "cpu_seconds": on / 10}, "off": {"seconds": off, "cpu_seconds": off / 10}}
        for on, off in pairs
    ]


def test_ratios_and_differences_are_of_pairs():
    measured = rounds((1.1, 1.0), (2.0, 2.0), (3.3, 3.0))
    assert over(measured)["median"] == pytest.approx(1.1)
    assert added_milliseconds(measured)["median"] == pytest.approx(10.0)
    assert over(measured)["low"] <= over(measured)["median"] <= over(measured)["high"]


def test_sizes():
    assert sized("small", repeats=3, ranks=2).ranks == 2
    assert {sized("small", repeats=3).tiny.pairs, sized("small", repeats=3).reference.pairs} == {3}
    assert sized("standard") == job.SIZES["standard"]
    with pytest.raises(ConfigError, match="--size huge: unknown"):
        sized("huge")


@pytest.mark.ranks
def test_two_trainers_take_turns_and_the_page_tells_of_them():
    pairs = Pairs(TINY, batch=1, steps=2, pairs=2, warmup=1)
    result = bench_metrics(TrainBench(zero_stage=0, samples=64, reference=pairs, tiny=pairs))
    assert result["metrics_on_over_off_interval"][0] <= result["metrics_on_over_off"]
    assert result["metrics_ms_per_step"] == added_milliseconds(result["tiny"]["rounds"])["median"]
    for kind in ("reference", "tiny"):
        assert [set(turns) for turns in result[kind]["rounds"]] == [{"on", "off"}] * 2
    told = page(result, "lathe bench metrics --size small")
    for line in summary(result).splitlines()[-3:]:
        assert f"- {line}" in told
    assert "lathe bench metrics --size small" in told
