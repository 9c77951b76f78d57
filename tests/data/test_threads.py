"""Threads that nobody waits for: order, errors, closing, and what they let go of."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import pytest

from pipeline.data.threads import WorkerThreads

LONG = 20.0  # seconds that no sound test takes


@contextmanager
def one_thread() -> Iterator[WorkerThreads]:
    threads = WorkerThreads(1, "test")
    try:
        yield threads
    finally:
        threads.close(LONG)


class Gate:
    """Work that keeps a thread until it is opened."""

    def __init__(self) -> None:
        self.begun, self._opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self._opened.wait(LONG)

    def open(self) -> None:
        self._opened.set()


@contextmanager
def held(threads: WorkerThreads) -> Iterator[None]:
    """While the only thread is busy, all that is submitted stays in the queue."""
    gate = Gate()
    threads.submit(gate, [])
    assert gate.begun.wait(LONG)
    try:
        yield
    finally:
        gate.open()


def appending(done: list[str], name: str, future: Future[str]) -> Callable[[], None]:
    def work() -> None:
        done.append(name)
        future.set_result(name)

    return work


def test_work_is_done_in_its_order_and_urgent_work_first() -> None:
    done: list[str] = []
    names = ["a", "b", "urgent", "c", "more urgent"]
    futures: dict[str, Future[str]] = {name: Future() for name in names}
    with one_thread() as threads:
        with held(threads):
            for name, future in futures.items():
                threads.submit(appending(done, name, future), [future], urgent="urgent" in name)
            assert not done
        assert [future.result(LONG) for future in futures.values()] == names
    assert done == ["more urgent", "urgent", "a", "b", "c"]


def test_so_many_threads_work_at_once_and_none_outlives_its_process() -> None:
    threads, gates = WorkerThreads(3, "three"), [Gate() for _ in range(4)]
    for gate in gates:
        threads.submit(gate, [])
    assert all(gate.begun.wait(LONG) for gate in gates[:3])
    assert not gates[3].begun.is_set()
    own = [thread for thread in threading.enumerate() if thread.name.startswith("three-")]
    assert len(own) == 3
    assert all(thread.daemon for thread in own)
    for gate in gates:
        gate.open()
    assert gates[3].begun.wait(LONG)
    threads.close(LONG)
    assert not any(thread.is_alive() for thread in own)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit("leave")])
def test_an_error_is_in_the_futures_that_are_not_done_and_ends_no_thread(count: int, error: BaseException) -> None:
    threads = WorkerThreads(count, "test")
    filled, first, second, later = (Future() for _ in range(4))

    def fail() -> None:
        filled.set_result("done before")
        raise error

    threads.submit(fail, [filled, first, second])
    threads.submit(lambda: later.set_result("goes on"), [later])
    assert first.exception(LONG) is second.exception(LONG) is error
    assert (filled.result(LONG), later.result(LONG)) == ("done before", "goes on")
    threads.close(LONG)


def test_close_cancels_what_is_queued_and_waits_no_longer_than_asked() -> None:
    threads, gate, done = WorkerThreads(2, "test"), Gate(), []
    for _ in range(2):
        threads.submit(gate, [])
    assert gate.begun.wait(LONG)
    queued: list[Future[str]] = [Future(), Future()]
    threads.submit(lambda: done.append("never"), queued)
    begun = time.monotonic()
    threads.close(0.2)  # of two threads that go on, together
    assert 0.2 <= time.monotonic() - begun < 5
    assert all(future.cancelled() for future in queued)
    gate.open()
    threads.close(LONG)
    assert not done


def test_close_waits_for_what_is_being_done() -> None:
    threads, begun, done = WorkerThreads(1, "test"), threading.Event(), Future[str]()

    def work() -> None:
        begun.set()
        time.sleep(0.1)
        done.set_result("whole")

    threads.submit(work, [done])
    assert begun.wait(LONG)
    threads.close(LONG)
    assert done.done()


def test_a_thread_may_close_its_own() -> None:
    threads, closed = WorkerThreads(1, "test"), Future[None]()
    threads.submit(lambda: closed.set_result(threads.close(LONG)), [closed])
    assert closed.result(LONG) is None


@pytest.mark.parametrize("count", [0, 2])
def test_what_is_submitted_after_close_is_cancelled(count: int) -> None:
    threads, done, future = WorkerThreads(count, "test"), [], Future[str]()
    threads.close(LONG)
    threads.submit(lambda: done.append("never"), [future], urgent=True)
    assert future.cancelled()
    assert not done


def test_without_threads_work_is_done_at_once_by_who_submits_it() -> None:
    threads, done = WorkerThreads(0, "test"), []
    threads.submit(lambda: done.append(threading.current_thread()), [])
    assert done == [threading.current_thread()]


def test_nothing_refers_to_work_that_is_done() -> None:
    """Blocks are large, and the next work may be long in coming."""

    class Block:
        pass

    def fill(_: Block, future: Future[None]) -> None:
        future.set_result(None)

    with one_thread() as threads:
        block, future = Block(), Future[None]()
        gone = weakref.ref(block), weakref.ref(future)
        threads.submit(partial(fill, block, future), [future])
        assert future.result(LONG) is None
        del block, future
        deadline = time.monotonic() + LONG
        while any(one() is not None for one in gone) and time.monotonic() < deadline:
            time.sleep(0.01)
            gc.collect()
        assert [one() for one in gone] == [None, None]
