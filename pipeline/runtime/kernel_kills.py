"""Processes that the kernel has ended because memory ran out: it leaves no other trace in them than SIGKILL (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path("/")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def counts(root: Path = _ROOT) -> dict[str, int]:
    """So far, by whose memory it was: "this job's memory limit", "this machine's memory". What is not known is missing.

    Args:
        root: where /proc and /sys are.
    """
    files = {"this job's memory limit": _of_group(root), "this machine's memory": [root / "proc/vmstat"]}
    found = {}
    for whose, places in files.items():
        for place in places:
            try:
                match = _COUNT.search(place.read_text(encoding="utf-8"))
            except OSError:
                continue
            if match:
                found[whose] = int(match[1])
                break
    return found


def since(before: dict[str, int], now: dict[str, int]) -> str:
    """Whose memory ran out in between, in a sentence; empty where none did."""
    for whose, count in now.items():
        more = count - before.get(whose, count)
        if more > 0:
            processes = f"{more} process{'es' * (more > 1)}"
            return f"the kernel ended {processes} for want of {whose} meanwhile, and this may be one"
    return ""


def _of_group(root: Path) -> list[Path]:
    """Where this process's control group counts: version 2, then 1; in a container the group is the root of its own."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    groups = {kind: path.lstrip("/") for _, kind, path in (line.split(":", 2) for line in lines if line.count(":") > 1)}
    mount = root / "sys/fs/cgroup"
    places = []
    if "" in groups:
        places += [mount / groups[""] / "memory.events", mount / "memory.events"]
    if "memory" in groups:
        places += [mount / "memory" / groups["memory"] / "memory.oom_control", mount / "memory/memory.oom_control"]
    return places
