"""Which rank stands where, told when nothing moves."""

from __future__ import annotations

import logging
import time

import pytest

from pipeline.config import EngineConfig
from pipeline.runtime.watchdog import Place, Watchdog, describe


def place(phase: str, step: int, since: float, *, host: str = "node1", seen: float = 100.0) -> Place:
    return Place(phase, step, since, host, seen)


def test_groups_of_ranks_in_one_line() -> None:
    stuck = place("waits for data", 1200, 55.0, host="node5")
    places = [place("computes", 1201, 30.0)] * 8
    places[1], places[3] = stuck, place("computes", 1200, 30.0, host="node7", seen=52.0)
    assert describe(places, 100.0, silent_seconds=16.0) == (
        "ranks 0, 2, 4-7 on node1: computes at step 1201 for 70 s;"
        " rank 1 on node5: waits for data at step 1200 for 45 s;"
        " rank 3 on node7: computes at step 1200 for 70 s, silent for 48 s"
    )


def test_on_one_machine_it_is_not_named() -> None:
    assert describe([place("saves", 4, 99.0)] * 2, 100.0, silent_seconds=9.0) == "ranks 0-1: saves at step 4 for 1 s"


def test_the_same_place_again_is_no_progress() -> None:
    watch = Watchdog()
    watch.note("waits for data", 3)
    since = watch.place.since
    watch.note("waits for data")
    assert watch.place.since == since
    watch.note("computes", 4)
    assert (watch.place.phase, watch.place.step) == ("computes", 4)


def test_a_note_costs_next_to_nothing() -> None:
    watch, notes = Watchdog(), 20_000
    started = time.perf_counter()
    for step in range(notes):
        watch.note("computes", step)
    assert (time.perf_counter() - started) / notes < 50e-6


def test_a_stall_is_told_with_the_stack_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch = Watchdog(stall_seconds=0.4)
    watch.note("saves", 7)
    watch.start()
    try:
        time.sleep(1.2)
        watch.note("computes", 8)
        time.sleep(0.3)
    finally:
        watch.close()
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == [
        "no progress for 0 s",
        "rank 0 is here",
        "no progress for 1 s",
        "rank 0 is here",
        "progress again, after 1 s without",
    ]
    assert "rank 0: saves at step 7 for 0 s" in said[0]
    assert "test_a_stall_is_told" in said[1]


@pytest.mark.parametrize(
    ("phases", "apart"),
    [
        ("a", [0]),  # in a run of one or two ranks all log their stacks
        ("aa", [0, 1]),
        ("ab", [0, 1]),
        ("aab", [2]),
        ("aabb", [0, 1, 2, 3]),
        ("aaabbb", []),
        ("aaaaaaba", [6]),
    ],
)
def test_ranks_that_stand_apart_log_their_stacks(phases: str, apart: list[int]) -> None:
    now = time.time()
    watches = [Watchdog(rank) for rank in range(len(phases))]
    for watch in watches:
        watch._others = [place(phase, 1, now, seen=now) for phase in phases]
        watch.note(phases[watch._rank], 1)
    assert [watch._rank for watch in watches if watch._is_apart()] == apart


def test_a_stall_is_told_before_the_time_out() -> None:
    with pytest.raises(ValueError, match="stall_seconds: 700, but after timeout_seconds=600 the run has ended"):
        EngineConfig(stall_seconds=700)
