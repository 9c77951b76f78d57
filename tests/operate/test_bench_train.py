"""`lathe bench train`: every figure follows from what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.errors import ConfigError, SetupError
from pipeline.operate.bench.train import bench
from pipeline.operate.bench.train.bench import bench_train, interval, judged, launch
from pipeline.operate.bench.train.gpu import stated_step_seconds
from pipeline.operate.bench.train.page import page, summary
from pipeline.operate.bench.train.sizes import TINY, Pairs, TrainBench, sized
from pipeline.runtime.peak import peak_flops

ENCODERS = {"autoencoder_widths": (32, 32, 32, 32), "text_width": 192, "text_layers": 1, "text_heads": 3}
SMALLEST = TrainBench(
    samples=64,
    reference=Pairs(TINY, batch=2, steps=1, pairs=2, warmup=1, encoders=ENCODERS),
    tiny=Pairs(TINY, batch=2, steps=2, pairs=2, warmup=1),
)


def measured(*turns: dict[str, float], device: str = "") -> dict:
    rounds = [{name: {"seconds": s, "cpu_seconds": 2 * s} for name, s in turn.items()} for turn in turns]
    return {"rounds": rounds, "flops_per_step": 10**12, "device_name": device, "ranks": 2}


@pytest.mark.ranks
def test_the_whole_benchmark_and_its_page():
    said: list[str] = []
    result = bench_train(SMALLEST, said.append)
    assert len(said) == 3
    reference = result["reference"]
    assert set(reference["seconds"]) == {"trainer", "bare", "bare_averaged", "usual"}
    assert result["step_over_bare"] == reference["over"]["bare"]["median"]
    assert reference["flops_per_step"] > 0
    assert reference["parameters"] > 0
    assert "usual" not in result["tiny"]["seconds"]
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result, allow_nan=False))
    assert "step_over_bare:" in summary(result)
    text = page(result, "lathe bench train --size small")
    assert "lathe bench train --size small" in text
    assert f"{reference['parameters']:,} parameters" in text


def test_ratios_are_of_turns_in_the_same_round_and_figures_are_medians():
    rounds = [
        {"usual": 6.0, "bare": 2.0, "trainer": 3.0},
        {"usual": 9.0, "bare": 4.0, "trainer": 4.0},
        {"usual": 4.0, "bare": 1.0, "trainer": 2.0},
    ]
    told = judged(measured(*rounds), "float32")
    assert told["over"]["bare"]["median"] == 1.5
    assert told["usual_over_step"]["median"] == 2.0
    assert told["seconds"] == {"trainer": 3.0, "bare": 2.0, "usual": 6.0}
    assert told["added_milliseconds"]["median"] == 1000.0
    assert told["added_cpu_milliseconds"]["median"] == 2000.0
    assert told["flops_per_second"] == pytest.approx(1e12 / 3)
    assert told["mfu"] is None


def test_utilisation_is_of_all_ranks_devices():
    told = judged(measured({"bare": 1.0, "trainer": 1.0}, device="NVIDIA A100-SXM4-80GB"), "bfloat16")
    assert told["mfu"] == pytest.approx(1e12 / (2 * 312e12))
    assert peak_flops("NVIDIA H100 PCIe", "float16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") is None
    assert peak_flops("a device of tomorrow", "bfloat16") is None


def test_the_stated_step_is_that_of_32_pictures_on_an_a100():
    assert stated_step_seconds() == pytest.approx(0.1378, rel=1e-3)


def test_the_interval_holds_the_median_and_narrows_with_the_values():
    values = [1.0, 1.1, 0.9, 1.05, 0.95]
    few, many = interval(values), interval(values * 20)
    assert few["low"] <= few["median"] == 1.0 <= few["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert interval([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_sizes():
    assert sized("small", repeats=3).tiny.pairs == 3
    assert sized("standard", ranks=2, precision="bfloat16") == replace(TrainBench(), ranks=2, precision="bfloat16")
    with pytest.raises(ConfigError, match="--size huge: unknown"):
        sized("huge")


@pytest.mark.ranks
def test_ranks_that_fail_are_told_with_their_last_words(tmp_path, capsys):
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(SetupError, match="the ranks of the benchmark failed"):
        launch(1, tmp_path / "job.json", tmp_path / "result.json")
    assert "KeyError: 'config'" in capsys.readouterr().err


def test_every_one_is_named_on_the_page():
    assert set(bench.ORDER) == {"trainer", "bare", "bare_averaged", "usual"}
