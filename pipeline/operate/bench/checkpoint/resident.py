"""The most memory that this process holds while something is done."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

_EVERY_SECONDS = 0.01


class Resident:
    """While it is entered, resident memory is looked at a hundred times a second; `most_bytes` is the largest."""

    def __init__(self) -> None:
        self._process, self._ended = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self.most_bytes = max(self.most_bytes, self._process.memory_info().rss)
