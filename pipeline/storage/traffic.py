"""What this process has asked of its stores, as running _totals. A request costs about 2 us here."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate

OPERATIONS = {
    "get_object": "read",
    "put_object": "write",
    "upload_part": "write",
    "head_object": "look",
    "head_bucket": "look",
    "list_objects_v2": "list",
    "delete_objects": "delete",
}
"""What S3's requests are for; others, which uploads in parts need, are `other`. Local files have `read` and `write`."""
OTHER = "other"
ERROR_KINDS = ("transient", "garbled", "slow", "forbidden", "no_keys", "no_room", OTHER)
"""What can be wrong with a request that is given up. All are told as 0 from the start: a rate does not see the first of
a series that begins with it."""
BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the buckets in which requests are counted by how long they took; the last one has none."""

_BUCKETS = [0] * (len(BOUNDS_SECONDS) + 1)

Numbers = float | Mapping[str, "Numbers"]


class _Totals:
    """All of them. The lock is held by whoever reads or changes them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.durations: defaultdict[str, list[int]] = defaultdict(_BUCKETS.copy)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.errors = Counter(dict.fromkeys(ERROR_KINDS, 0))
        self.retries = self.read = self.written = 0


_totals = _Totals()


def count(operation: str, seconds: float) -> None:
    """One request, or one local file opened: which, and how long it took."""
    bucket = bisect_left(BOUNDS_SECONDS, seconds)
    with _totals.lock:
        _totals.durations[operation][bucket] += 1
        _totals.seconds[operation] += seconds


def count_bytes(*, read: int = 0, written: int = 0) -> None:
    """Bytes that came or went."""
    with _totals.lock:
        _totals.read += read
        _totals.written += written


def count_retry() -> None:
    """A request that is to be repeated."""
    with _totals.lock:
        _totals.retries += 1


def count_error(kind: str) -> None:
    """A request that was given up because the store could not serve it; `kind` is one of `ERROR_KINDS`, or `other`."""
    with _totals.lock:
        _totals.errors[kind if kind in ERROR_KINDS else OTHER] += 1


@contextmanager
def timed(operation: str) -> Iterator[None]:
    """Count what is done in this context as one request, unless it fails."""
    began = time.perf_counter()
    yield
    count(operation, time.perf_counter() - began)


def counters() -> dict[str, Numbers]:
    """Totals of this process over all its stores, from any thread.

    Returns:
        `requests` by operation (S3 requests and local files opened, retries included), `retries`, `errors` by kind
        (requests given up because the store could not serve them), `read_bytes`, `written_bytes`, and
        `request_seconds` by operation: requests by the upper end of how long they took, each with those before it, and
        the `sum` of all seconds.
    """
    with _totals.lock:
        durations = {operation: tuple(counts) for operation, counts in _totals.durations.items()}
        seconds, errors = dict(_totals.seconds), dict(_totals.errors)
        retries, read, written = _totals.retries, _totals.read, _totals.written
    ends = [*map(str, BOUNDS_SECONDS), "+Inf"]
    return {
        "requests": {operation: sum(counts) for operation, counts in durations.items()},
        "retries": retries,
        "errors": errors,
        "read_bytes": read,
        "written_bytes": written,
        "request_seconds": {
            operation: {**dict(zip(ends, accumulate(counts), strict=True)), "sum": seconds[operation]}
            for operation, counts in durations.items()
        },
    }


os.register_at_fork(after_in_child=_totals.reset)
