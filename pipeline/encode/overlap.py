"""One stage of the encoder running ahead of the next."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_POLL_SECONDS = 0.1  # how soon a stage notices that nobody wants its items any more


@dataclass(frozen=True)
class _End:
    failure: BaseException | None


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items in order, made by a thread of their own up to `depth` ahead.

    What the thread raises is raised here, in its place among the items. When the iterator returned is closed, the
    thread ends at its next item.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(item: T | _End) -> bool:
        while not unwanted.is_set():
            try:
                waiting.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        failure = None
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            failure = error
        put(_End(failure))

    threading.Thread(target=run, name="ahead", daemon=True).start()
    try:
        while True:
            item = waiting.get()
            if not isinstance(item, _End):
                yield item
            elif item.failure is not None:
                raise item.failure
            else:
                return
    finally:
        unwanted.set()


def mapped(pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`function` of each item, in order, at most `ahead` of them under way or waiting to be taken."""
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class Budget:
    """A number of bytes that may be under way at once. One item beyond it passes alone.

    Args:
        limit: in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until `count` bytes more may be under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._used or self._used + count <= self._limit)
            self._used += count

    def give(self, count: int) -> None:
        """These bytes are no longer under way."""
        with self._changed:
            self._used -= count
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone pass: what was under way is not wanted any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
