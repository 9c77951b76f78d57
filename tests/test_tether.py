"""Processes that end with the one that started them, and signals that come while they are started."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import psutil
import pytest

from pipeline.tether import signals_deferred

pytestmark = pytest.mark.alone

# The first hook that is registered is the last one before the fork, and has no Python of its own: the signal is
# handled in the first hook after the fork, which is logging's.
SIGNALLED_AT_THE_FORK = """
import ctypes, functools, os, signal
os.register_at_fork(before=functools.partial(ctypes.CDLL(None).kill, os.getpid(), int(signal.{name})))
import logging, sys, threading
from pipeline.tether import start_tethered
if {own}:
    signal.signal(signal.{name}, signal.default_int_handler)
try:
    start_tethered([sys.executable, "-c", "import time; time.sleep(60)"])
except KeyboardInterrupt:
    other = threading.Thread(target=logging.getLogger("x").isEnabledFor, args=(10,), daemon=True)
    other.start()
    other.join(20)
    sys.exit(6 if other.is_alive() else 5)
"""


@pytest.mark.parametrize(
    ("name", "own", "code"),
    [*((name, True, 5) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")), ("SIGTERM", False, -15)],
)
def test_a_signal_in_the_midst_of_a_fork_is_neither_lost_nor_leaves_a_lock(name: str, own: bool, code: int) -> None:
    program = SIGNALLED_AT_THE_FORK.format(name=name, own=own)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_a_child_ends_with_its_parent() -> None:
    program = (
        "import sys, time\nfrom pipeline.tether import start_tethered\n"
        "print(start_tethered([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(10)


def test_what_is_ignored_stays_ignored_and_what_was_before_comes_back() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_deferred():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        with pytest.raises(KeyboardInterrupt), signals_deferred():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def elsewhere() -> None:
        with signals_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
