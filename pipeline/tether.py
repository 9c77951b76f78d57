"""Processes that must not outlive the one that started them, however it ended (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(signum: signal.Signals) -> None:
    """From now on this process gets `signum` when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def before_exec(signum: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """The same for a child about to be started, as `subprocess.Popen(preexec_fn=...)`; None where it cannot be had.

    It is one system call of a library that is loaded before the fork, so it is safe beside threads.
    """
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signum)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)

    return tie
