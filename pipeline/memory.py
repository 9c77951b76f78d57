"""Memory of this process: whether it is short of it, whether what it frees is kept, and the most that it held."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's mallopt
_MOST_KEPT, _LARGEST_KEPT = (1 << 31) - 1, 32 << 20  # the most that glibc takes
_PLENTY_BYTES = 1 << 30  # four times the largest picture, and far more than a table's rows


@functools.cache
def keep_freed() -> None:
    """Keep freed memory for what is allocated next, in this process from now on: glibc's malloc, else nothing changes.

    By default it hands pieces of a few MB back to the system and asks for them anew, page by page, which takes longer
    than filling them. Now it keeps pieces of up to 32 MiB, and threads that begin later share them: the process stays
    about as large as it was at its largest. Whoever has set malloc by the environment is not interfered with.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_ARENA_MAX, 1)


def is_scarce() -> bool:
    """Whether less is left than any file may ask for that is not damaged: tells whose fault a MemoryError is."""
    return _available_bytes() <= _PLENTY_BYTES


def resident() -> dict[str, float]:
    """`resident_memory_bytes` of this process, for metrics; nothing where that is not to be learnt.

    A process that can open no more files, for one, learns nothing of itself: no reason to end its job.
    """
    with suppress(OSError, psutil.Error):
        return {"resident_memory_bytes": psutil.Process().memory_info().rss}
    return {}


def _available_bytes() -> int:
    """Memory that this process can still get: of the machine, and under its own limit of addresses (ulimit -v)."""
    available = psutil.virtual_memory().available
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return available if limit == resource.RLIM_INFINITY else min(available, limit - psutil.Process().memory_info().vms)


def limit_bytes(root: Path = Path("/")) -> int:
    """Memory that all processes of this job together can have: the machine's, or its control group's (Linux).

    Args:
        root: where /proc and /sys are.
    """
    limits = [psutil.virtual_memory().total]
    for file in group_files("memory.max", "memory.limit_in_bytes", root):
        try:
            said = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        limits += [int(said)] if said.isdecimal() else []  # "max": none
    return min(limits)


def group_files(name: str, name_in_1: str, root: Path = Path("/")) -> list[Path]:
    """A file of this process's control group and of those around it, from the inside; they need not exist.

    In a container the group is the root of its own.

    Args:
        name: in version 2 of control groups.
        name_in_1: in version 1.
        root: where /proc and /sys are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = {kind: path.lstrip("/") for _, kind, path in (line.split(":", 2) for line in lines if line.count(":") > 1)}
    mount = root / "sys/fs/cgroup"
    return [
        top.joinpath(inner, file)
        for kind, top, file in (("", mount, name), ("memory", mount / "memory", name_in_1))
        if kind in groups
        for inner in (Path(groups[kind]), *Path(groups[kind]).parents)
    ]


class MemoryPeak:
    """The largest sum of resident memory over this process and all its descendants, in bytes, while it is open.

    Pages that processes share are counted once for each, so the figure is an upper bound.

    Args:
        interval_seconds: how often it is looked at.
        alone: this process without its descendants.
    """

    def __init__(self, interval_seconds: float = 0.5, *, alone: bool = False) -> None:
        self.bytes = 0
        self._interval, self._alone, self._stop = interval_seconds, alone, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self._interval):
            total = 0
            for process in [me] if self._alone else [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)
