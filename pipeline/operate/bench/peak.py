"""The largest resident memory that this process ever had."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import SetupError

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Bytes, since this program was started: getrusage's figure would begin with the peak of whoever started it.

    Raises:
        SetupError: the system does not tell.
    """
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SetupError(f"{_STATUS} does not tell this process's peak memory", "measure memory on Linux")
