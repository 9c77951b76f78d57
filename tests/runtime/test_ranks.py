"""Two real ranks with a real DeepSpeed engine, started once; each test looks at one of the things they did."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

pytestmark = pytest.mark.ranks


def test_the_ranks_are_real(results):
    assert [result["world_size"] for result in results] == [2, 2]
    assert {name: found["engine"] for name, found in results[0]["averages"]["float32"].items()} == {
        "ddp": "DistributedDataParallel, float32",
        "zero1": "DeepSpeedEngine, ZeRO stage 1, float32",
        "zero2": "DeepSpeedEngine, ZeRO stage 2, float32",
        "zero3": "DeepSpeedEngine, ZeRO stage 3, float32",
    }


def test_nothing_a_newcomer_would_stumble_over_is_printed(folder):
    said = (folder / "output.txt").read_text().splitlines()
    told = ["what is too old could not be deleted after step 12: cannot delete", "  mend the store"]  # by one test
    assert [line for line in said if "SHA-256" not in line] == told


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


def test_a_snapshot_that_fails_on_one_rank_fails_on_all_but_not_where_an_older_one_cannot_be_deleted(results):
    assert results[0]["snapshotting"]["failures"] == ["", "cannot delete", "rank 1 failed"]
    assert results[1]["snapshotting"]["failures"] == ["", "rank 0 failed", "cannot write"]


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_fragments_cover_each_trained_parameter_once(results, engine):
    covered = defaultdict(list)
    for result in results:
        own = result["averages"]["float32"][engine]["fragments"]
        assert len({name for name, _, _ in own}) == len(own)
        for name, offset, length in own:
            covered[name] += range(offset, offset + length)
    assert {name: len(elements) for name, elements in covered.items()} == {
        "inner.0.weight": 231,
        "inner.0.bias": 33,
        "inner.1.weight": 33,
        "inner.1.bias": 33,
        "inner.3.weight": 231,
        "inner.3.bias": 7,
    }
    assert all(sorted(elements) == list(range(len(elements))) for elements in covered.values())
    assert any(offset for _, offset, _ in results[1]["averages"]["float32"][engine]["fragments"])


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
    assert [result["time_outs"] for result in results] == [[250.0, 250.0]] * 2


def test_one_rank_without_a_launcher_takes_over_from_two(alone, results, folder):
    assert alone["world_size"] == 1
    assert alone["elsewhere"]["counters"] == results[0]["saving"]["counters"]
    assert alone["elsewhere"]["ema"] == [0.0, 0.0, 0.0]
    assert alone["elsewhere"]["losses"] == pytest.approx(json.loads((folder / "losses.json").read_text()), rel=1e-5)


def test_another_world_size_than_the_run_file_asks_for_is_refused(alone):
    assert alone["wrong_world"].startswith("engine.world_size=3, but 1 rank was started\n  start 3 ranks")
