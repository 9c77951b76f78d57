"""What this process has asked of its stores, as running totals."""

from __future__ import annotations

import os
import threading
from collections import Counter

_NAMES = ("requests", "retries", "errors", "bytes_read", "bytes_written")
_lock = threading.Lock()
_totals: Counter[str] = Counter()


def count(**amounts: int) -> None:
    """Add to the totals, by their names."""
    with _lock:
        _totals.update(amounts)


def counters() -> dict[str, int]:
    """Totals of this process over all its stores, from any thread.

    Returns:
        `requests` (S3 requests and local files opened, retries included), `retries`, `errors` (requests given up
        because the store could not serve them), `bytes_read` and `bytes_written`.
    """
    with _lock:
        return {name: _totals[name] for name in _NAMES}


def _after_fork() -> None:
    global _lock, _totals
    _lock, _totals = threading.Lock(), Counter()


os.register_at_fork(after_in_child=_after_fork)
