"""Blocks whose samples do not count, because they were damaged or could not be read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence

from pipeline.config import LoaderConfig
from pipeline.errors import LatheError

_log = logging.getLogger(__name__)

WHOLE_SHARD = -1
Skip = tuple[int, int, int]
"""Data set, shard, and the block's number in the receipt; `WHOLE_SHARD` where its receipt cannot be used."""


class SkipList:
    """What is skipped, and how many samples that is; safe in threads.

    Args:
        config: whether blocks may be skipped, and how many.
        samples: of all streams, of which a share may be skipped.
        known: skipped before, by this run: as `all` told it.
    """

    def __init__(self, config: LoaderConfig, samples: int, known: Iterable[Sequence[int]]) -> None:
        self._config, self._samples = config, samples
        self._known: dict[Skip, int] = {(dataset, shard, block): n for dataset, shard, block, n in known}
        self._lock = threading.Lock()

    def holds(self, skip: Skip) -> bool:
        """Whether a block is skipped, by itself or with its shard."""
        return skip in self._known or (*skip[:2], WHOLE_SHARD) in self._known

    def add(self, skip: Skip, samples: int, error: LatheError) -> None:
        """Skip `samples` more because of `error`. Raises it where that is not wanted, or where they are too many."""
        if self._config.on_damage == "fail":
            raise error
        with self._lock:
            if skip in self._known:
                return
            if skip[2] == WHOLE_SHARD:
                self._known = {known: n for known, n in self._known.items() if known[:2] != skip[:2]}
            self._known[skip] = samples
            total = sum(self._known.values())
        if total > self._config.max_skip_rate * self._samples:
            raise type(error)(
                f"{error.message}; with it {total} of {self._samples} samples are skipped, more than"
                f" loader.max_skip_rate={self._config.max_skip_rate:g} allows",
                error.remedy,
            ) from error
        _log.warning("%s; its %d samples are skipped from now on", error.message, samples)

    def all(self) -> list[list[int]]:
        """Every one, sorted: data set, shard, block, and how many samples it has."""
        with self._lock:
            return [[*skip, samples] for skip, samples in sorted(self._known.items())]
