"""Threads for the loader's work. A process that ends does not wait for them, nor does who closes them, for long."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

Futures = Sequence["Future[Any]"]


class WorkerThreads:
    """A few daemon threads that do work as it comes; without any, who submits it does. Work fills in its futures.

    An executor of the standard library does all that is queued before its process may end.

    Args:
        count: how many.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._queue: deque[tuple[Callable[[], None], Futures]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], None], futures: Futures, *, urgent: bool = False) -> None:
        """Queue work, or put it before all that is queued. Its futures are cancelled if it is never done."""
        if not self._threads and not self._closed:
            _do(work, futures)
            return
        with self._changed:
            if not self._closed:
                (self._queue.appendleft if urgent else self._queue.append)((work, futures))
                self._changed.notify()
                return
        _cancel(futures)

    def close(self, seconds: float) -> None:
        """Drop what is queued, and wait that long at most for what is being done. May be called twice."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for _, futures in dropped:
            _cancel(futures)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                work, futures = self._queue.popleft()
            _do(work, futures)
            del work, futures  # or their blocks would live until there is more work


def _do(work: Callable[[], None], futures: Futures) -> None:
    try:
        work()
    except BaseException as error:
        for future in futures:
            if not future.done():
                future.set_exception(error)


def _cancel(futures: Futures) -> None:
    for future in futures:
        future.cancel()
