from __future__ import annotations

import threading
import time

import pytest

from pipeline.encode.overlap import Budget, ahead


def test_order_is_kept():
    assert list(ahead(range(1000), depth=3)) == list(range(1000))
    assert list(ahead([], depth=1)) == []


def test_it_runs_ahead_but_not_further_than_its_depth():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    stream = ahead(items(), depth=4)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6  # one taken, four waiting, one in hand
    stream.close()


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise KeyError("two")

    stream = ahead(items(), depth=5)
    assert next(stream) == 1
    with pytest.raises(KeyError, match="two"):
        next(stream)


def test_closing_ends_the_thread():
    before = threading.active_count()
    stream = ahead(iter(int, 1), depth=2)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before  # one of an earlier test may have ended


def test_a_budget_holds_back_what_is_too_much_and_lets_one_alone_pass():
    budget, passed = Budget(10), threading.Event()
    budget.take(25)

    def wait() -> None:
        budget.take(1)
        passed.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not passed.wait(0.2)
    budget.give(25)
    assert passed.wait(10)


def test_a_closed_budget_holds_nobody_back():
    budget, passed = Budget(10), threading.Event()
    budget.take(10)
    waiting = threading.Thread(target=lambda: (budget.take(5), passed.set()), daemon=True)
    waiting.start()
    budget.close()
    assert passed.wait(10)
