"""The estimate of what states take is the table of docs/engines.md, which other tests hold against real engines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config import EngineConfig
from pipeline.runtime.state_bytes import state_bytes

PAGE = (Path(__file__).parents[2] / "docs/engines.md").read_text()
ROWS = re.findall(r"^\| (DDP|ZeRO-\d), ([^|]+) \|.*\| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
MANY = 1_000_000


@pytest.mark.parametrize(("engine", "precision", "two", "many"), ROWS)
def test_as_the_page_says(engine: str, precision: str, two: str, many: str) -> None:
    stage = 0 if engine == "DDP" else int(engine[-1])
    for name in precision.split(" or "):
        config = EngineConfig(zero_stage=stage, precision=name)
        for ranks, said in ((2, two), (64, many)):
            found = state_bytes(config, MANY, averages=1, ranks=ranks).device / MANY
            assert found == pytest.approx(float(said), abs=0.06)


def test_the_page_has_every_engine() -> None:
    assert [(engine, "float32" in precision) for engine, precision, *_ in ROWS] == [
        (engine, is_float32) for is_float32 in (True, False) for engine in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
    ]


def test_offloaded_states_are_the_hosts() -> None:
    here = state_bytes(EngineConfig(zero_stage=3, precision="bfloat16"), MANY, averages=1, ranks=4)
    away = state_bytes(
        EngineConfig(zero_stage=3, precision="bfloat16", offload_optimizer=True, offload_parameters=True),
        MANY,
        averages=1,
        ranks=4,
    )
    assert (here.host, away.device) == (0, round(MANY * 2 / 4))  # gradients
    assert away.host + away.device == here.device
    assert here.saved == away.saved == MANY * 4 * 4 // 4


def test_one_rank_alone_has_no_buckets() -> None:
    assert state_bytes(EngineConfig(zero_stage=0), MANY, averages=1, ranks=1).device == 20 * MANY
