"""Whether this process is short of memory."""

from __future__ import annotations

import resource

import psutil

_PLENTY_BYTES = 1 << 30  # four times the largest picture, and far more than a table's rows


def is_scarce() -> bool:
    """Whether less is left than any file may ask for that is not damaged: tells whose fault a MemoryError is."""
    return _available_bytes() <= _PLENTY_BYTES


def _available_bytes() -> int:
    """Memory that this process can still get: of the machine, and under its own limit of addresses (ulimit -v)."""
    available = psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available if limit == resource.RLIM_INFINITY else min(available, limit - psutil.Process().memory_info().vms)
