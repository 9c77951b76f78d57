"""Processes that the kernel has ended because memory ran out: it leaves no other trace in them than SIGKILL (Linux)."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.memory import group_files

_ROOT = Path("/")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def counts(root: Path = _ROOT) -> dict[str, int]:
    """So far, by whose memory it was: "this job's memory limit", "this machine's memory". What is not known is missing.

    Args:
        root: where /proc and /sys are.
    """
    files = {
        "this job's memory limit": group_files("memory.events", "memory.oom_control", root),
        "this machine's memory": [root / "proc/vmstat"],
    }
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
