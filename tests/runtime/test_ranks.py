"""Two real ranks with a real DeepSpeed engine, started once; each test looks at one of the things they did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_ranks.py")
LAUNCH = ["-m", "pipeline.runtime.launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]

pytestmark = pytest.mark.ranks


def run(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "output.txt").write_text(run(*LAUNCH, str(SCRIPT), str(folder), "write"))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    return [json.loads((folder / f"write-{rank}.json").read_text()) for rank in (0, 1)]


def test_the_ranks_are_real(results):
    assert [result["world_size"] for result in results] == [2, 2]
    assert results[0]["2 float32"]["engine"] == "DeepSpeedEngine, ZeRO stage 2, float32"
    assert results[0]["2 bfloat16"]["engine"] == "DeepSpeedEngine, ZeRO stage 2, bfloat16"


def test_nothing_a_newcomer_would_stumble_over_is_printed(folder):
    said = (folder / "output.txt").read_text().splitlines()
    assert [line for line in said if "SHA-256" not in line] == []


EXACT = {"ema.main": 0.0, "ema.slow": 0.0, "ema.power": 0.0}


@pytest.mark.parametrize("case", ["1 float32", "2 float32", "many steps"])
def test_averages_and_weights_equal_a_float32_reference(results, case):
    for result in results:
        assert result[case]["averages"] == EXACT
        assert result[case]["weight"] == 0.0


def test_averages_are_float32_and_made_of_the_masters_where_the_working_weights_are_not(results):
    for result in results:
        assert result["2 bfloat16"]["dtypes"] == ["torch.float32"]
        assert result["own masters"]["off"] == 0.0
        assert result["own masters"]["of_working"] > 0.0


def test_a_part_of_the_model_learns_at_its_own_rate(results):
    for result in results:
        assert result["own_rate"] == {"groups": [4, 2], "weight": [0.0, 0.0]}


def test_snapshots_hold_averages_alone_and_have_their_own_retention(results):
    for result in results:
        found = result["snapshotting"]
        assert found["taken"][:2] == [[], [9, 8, 6]]
        assert "cannot be trained on: it has no weight, exp_avg, exp_avg_sq, ema.main, ema.slow" in found["refused"]


def test_snapshots_are_of_one_course_and_none_is_missing(results):
    for result in results:
        found = result["snapshotting"]
        assert found["missed"] == [False, False, True, False]  # 7 is not due; 4 was too old
        assert found["taken"][2:] == [[8, 6], [8, 6]]
    assert results[0]["snapshotting"]["gone"] == [[], ["step-00000009"], []]


def test_no_completion_marker_is_read_when_a_snapshot_is_taken(results):
    assert results[0]["snapshotting"]["markers_read"] == 0


def test_a_snapshot_that_fails_on_one_rank_fails_on_all(results):
    assert results[0]["snapshotting"]["failures"] == ["cannot delete", "cannot delete", "rank 1 failed"]
    assert results[1]["snapshotting"]["failures"] == ["rank 0 failed", "rank 0 failed", "cannot write"]


def test_fragments_cover_each_trained_parameter_once(results):
    covered = defaultdict(list)
    for result in results:
        for name, offset, length in result["2 float32"]["fragments"]:
            covered[name] += range(offset, offset + length)
    assert "table.weight" not in covered
    assert {name: len(elements) for name, elements in covered.items()} == {
        "inner.0.weight": 231,
        "inner.0.bias": 33,
        "inner.1.weight": 33,
        "inner.1.bias": 33,
        "inner.3.weight": 231,
        "inner.3.bias": 7,
    }
    assert all(sorted(elements) == list(range(len(elements))) for elements in covered.values())
    assert any(offset for _, offset, _ in results[1]["2 float32"]["fragments"]), "no parameter crosses the border"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(results, precision):
    for result in results:
        found = result["non_finite"][precision]
        assert found["skipped"]
        assert found["norm"] == float("inf")
        assert found["kept"], "the skipped step changed the state"
        assert not found["then"]
        assert found["steps"] == 3


def test_restored_state_is_bit_equal_in_another_stage_and_goes_on_so(results):
    for result in results:
        found = result["saving"]
        assert found["counters"] == {"skipped": 2, "step": 3, "optimizer_step": 3}
        assert found["notes"] == [{"rank": 0}, {"rank": 1}]
        assert found["restored"]
        assert found["losses"][0] == found["losses"][1]
        assert found["after"]


def test_a_save_that_fails_on_one_rank_is_told_on_all_and_loses_nothing(results):
    assert results[1]["failing_save"] == {"error": "no space left", "exit_code": 3, "latest": "step-00000003"}
    assert results[0]["failing_save"] == {"error": "rank 1 failed", "exit_code": 3, "latest": "step-00000003"}


def test_a_damaged_file_is_noticed_by_all_ranks_and_told_by_one(results, folder):
    """The one that all read, and the one that only the last rank does."""
    assert [found["restored"] for result in results for found in result["damaged"]] == [False] * 4
    said = (folder / "output.txt").read_text()
    for file in ("run.json", "rank-00001-of-00002.safetensors"):
        assert said.count(f"{file} is damaged: its SHA-256 is not the one noted; the checkpoint is passed over") == 1


def test_a_stop_flag_reaches_all_ranks(results):
    assert [result["flags"] for result in results] == [[0, 15, 0]] * 2


def test_what_differs_between_ranks_is_named_on_all(results):
    assert [result["differing"] for result in results] == [[[], ["b", "c"]]] * 2


def test_no_group_waits_longer_for_a_rank_than_it_was_told(results):
    assert [result["time_outs"] for result in results] == [[60.0, 60.0]] * 2


@pytest.fixture(scope="module")
def alone(folder, results) -> dict:
    run(str(SCRIPT), str(folder), "read")
    return json.loads((folder / "read-0.json").read_text())


def test_one_rank_without_a_launcher_takes_over_from_two(alone, results, folder):
    assert alone["world_size"] == 1
    assert alone["elsewhere"]["counters"] == results[0]["saving"]["counters"]
    assert alone["elsewhere"]["ema"] == [0.0, 0.0, 0.0]
    assert alone["elsewhere"]["losses"] == pytest.approx(json.loads((folder / "losses.json").read_text()), rel=1e-5)


def test_averages_of_fifty_steps_on_one_rank_equal_a_float32_reference(alone):
    assert alone["many steps"]["averages"] == EXACT
    assert alone["many steps"]["weight"] == 0.0


def test_another_world_size_than_the_run_file_asks_for_is_refused(alone):
    assert alone["wrong_world"].startswith("engine.world_size=3, but 1 rank was started\n  start 3 ranks")
