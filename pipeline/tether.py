"""Processes that must not outlive the one that started them, however it ended (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1  # prctl(2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def end_with_parent(signum: signal.Signals) -> None:
    """From now on this process gets `signum` when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def start_tethered(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen`, of a process that gets SIGTERM when the thread that starts it ends, however that was."""
    with signals_deferred():
        return subprocess.Popen(command, preexec_fn=_before_exec(), **options)  # noqa: PLW1509


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that ask to stop take effect when the block is left.

    For what starts processes: Python drops an exception that a handler raises in one of the hooks around a fork, so
    that the signal is lost, and the lock that the hook was letting go of (logging's) is held for good.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    noted: list[int] = []
    before = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    # what is ignored has to stay so in the child
    try:
        _swap(dict.fromkeys(before, lambda number, _frame: noted.append(number)))
        yield
    finally:
        _swap(before)
        if noted:
            signal.raise_signal(max(noted))  # one is enough to end it, and SIGTERM says more than SIGINT


def _swap(handlers: Mapping[signal.Signals, Any]) -> None:
    """All of them or none: nothing is delivered in between."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _before_exec() -> Callable[[], None] | None:
    """Ties the child to its parent; None where it cannot be had.

    It is one system call of a library that is loaded before the fork, so it is safe beside threads.
    """
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended in between
            os._exit(1)

    return tie
