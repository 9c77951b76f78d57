"""Ranks begin a step only where all hold its batch: they stop and fail together, and nobody waits for data deafly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import DataError, LatheError
from pipeline.runtime.launch import OtherRankError
from pipeline.runtime.watchdog import Watchdog
from pipeline.train import feed as feed_module
from pipeline.train.feed import Feed
from pipeline.train.preemption import StopRequest

TERM = 15
WAITED: dict[int, list[float]] = {}  # by rank, seconds: for data, and for the other
HEARD: dict[int, list[tuple[int, ...]]] = {}  # by rank, while data were waited for


class Ranks:
    """Two ranks in threads, which post to each other as processes do."""

    def __init__(self) -> None:
        self.barrier, self.flags = threading.Barrier(2, timeout=20), [(0, 0), (0, 0)]

    def rank(self, rank: int) -> Any:
        def post(*flags: int) -> None:
            self.flags[rank] = flags

        def posted() -> tuple[int, ...]:
            self.barrier.wait()
            found = tuple(max(flags) for flags in zip(*self.flags, strict=True))
            self.barrier.wait()
            return found

        def agree(problem: LatheError | None) -> None:
            if problem is not None:
                raise problem
            raise OtherRankError("the other rank failed", "")

        return SimpleNamespace(post=post, posted=posted, agree=agree, watch=Watchdog())


class Loader:
    """Gives numbers; before some of them something happens."""

    def __init__(self, **before: Callable[[Callable[[], bool]], bool | None]) -> None:
        self.before, self.number = before, 0

    def take(self, gives_up: Callable[[], bool]) -> Any:
        event = self.before.get(f"n{self.number}")
        if event is not None and event(gives_up):
            return None
        self.number += 1
        return self.number - 1


def run(*loaders: Loader, requests: list[StopRequest] | None = None, steps: int = 5) -> list[dict[str, Any]]:
    ranks, results = Ranks(), [{}, {}]
    requests = requests or [StopRequest(), StopRequest()]

    def one(rank: int) -> None:
        heard: list[tuple[int, ...]] = []
        feed = Feed(loaders[rank], ranks.rank(rank), requests[rank], steps, own=lambda: (rank, 7), hear=heard.append)
        seen = []
        WAITED[rank] = [0.0, 0.0]
        while (batch := feed.next()) is not None:
            seen.append(batch)
            WAITED[rank][0] += feed.waited_seconds
            WAITED[rank][1] += feed.ranks_wait_seconds
        results[rank] = {"seen": seen, "stop": feed.stopped_by, "over": feed.is_over, "failed": feed.failed}
        assert feed.told == (1, 7)
        HEARD[rank] = heard
        if feed.failed:
            with pytest.raises(LatheError) as told:
                feed.raise_failure()
            results[rank]["told"] = told.value.message

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_all_batches_are_given_and_none_beyond_is_asked_for() -> None:
    loaders = [Loader(), Loader()]
    assert run(*loaders) == [{"seen": [0, 1, 2, 3, 4], "stop": 0, "over": True, "failed": False}] * 2
    assert [loader.number for loader in loaders] == [5, 5]


def test_without_a_step_left_nothing_is_read() -> None:
    def never(_: Callable[[], bool]) -> None:
        raise DataError("damaged")

    assert run(Loader(n0=never), Loader(n0=never), steps=0)[0]["over"]


def test_both_leave_at_one_step_when_one_is_asked_to_stop() -> None:
    requests = [StopRequest(), StopRequest()]
    asks = Loader(n3=lambda _: setattr(requests[1], "signal", TERM))
    results = run(Loader(), asks, requests=requests)
    assert results == [{"seen": [0, 1, 2], "stop": TERM, "over": True, "failed": False}] * 2
    assert [request.signal for request in requests] == [TERM, TERM]  # a launcher that asks again disturbs neither


def test_who_waits_for_data_hears_the_signal_and_the_other_is_not_left_in_a_step() -> None:
    requests = [StopRequest(), StopRequest()]

    def outage(gives_up: Callable[[], bool]) -> bool:
        assert not gives_up()
        requests[0].signal = TERM
        return gives_up()

    results = run(Loader(n2=outage), Loader(), requests=requests)
    assert results == [{"seen": [0, 1], "stop": TERM, "over": True, "failed": False}] * 2


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_batch_that_cannot_be_had_ends_both_after_the_same_step(number: int) -> None:
    def damaged(_: Callable[[], bool]) -> None:
        raise DataError("block 7 is damaged")

    results = run(Loader(), Loader(**{f"n{number}": damaged}))
    seen = list(range(number))
    common = {"seen": seen, "stop": 0, "over": False, "failed": True}
    assert results == [{**common, "told": "the other rank failed"}, {**common, "told": "block 7 is damaged"}]


def test_who_waits_says_so_and_the_others_hear_their_signals_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage on one rank; the other one is asked to stop after some rounds."""
    monkeypatch.setattr(feed_module, "_PATIENCE_SECONDS", 0.05)
    requests, rounds = [StopRequest(), StopRequest()], []

    def outage(gives_up: Callable[[], bool]) -> bool:
        started = time.monotonic()
        while not gives_up():
            assert time.monotonic() < started + 5
        rounds.append(time.monotonic() - started)
        if len(rounds) == 3:
            requests[0].signal = TERM  # of the rank that waits for this one
        return True

    results = run(Loader(), Loader(n2=outage), requests=requests)
    assert results == [{"seen": [0, 1], "stop": TERM, "over": True, "failed": False}] * 2
    assert len(rounds) in (3, 4)
    assert max(rounds) < 1
    assert set(HEARD[0]) == {(1, 7)}  # saves go on meanwhile
    assert HEARD[0] == HEARD[1]


def test_an_outage_that_ends_loses_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "_PATIENCE_SECONDS", 0.02)
    rounds = []

    def outage(gives_up: Callable[[], bool]) -> bool:
        rounds.append(0)
        while len(rounds) < 4 and not gives_up():
            pass
        time.sleep(0.03)
        return len(rounds) < 4

    results = run(Loader(n1=outage), Loader())
    assert results == [{"seen": [0, 1, 2, 3, 4], "stop": 0, "over": True, "failed": False}] * 2
    (data, _), (other_data, other) = WAITED[0], WAITED[1]
    assert data >= 0.1
    assert other_data < data / 2
    assert other >= 0.1  # it is not told as if nothing had been waited for
