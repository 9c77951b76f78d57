"""Ctrl-C and SIGTERM: one line, the conventional exit code, and no waiting for what takes long."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.stopping import SAID, PromptStop

pytestmark = pytest.mark.alone

START = "import hashlib, sys, threading, time\nfrom pipeline.stopping import PromptStop, Stopped, when_stopped\n"
IN_PYTHON = "time.sleep(60)"
IN_A_LIBRARY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
WITH_A_THREAD_LEFT = "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"


@pytest.mark.parametrize(
    ("number", "work"),
    [
        *itertools.product(
            [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], [IN_PYTHON, IN_A_LIBRARY, WITH_A_THREAD_LEFT]
        ),
        (signal.SIGUSR1, IN_A_LIBRARY),
        (signal.SIGUSR2, IN_PYTHON),
    ],
)
def test_a_process_ends_promptly_whatever_it_is_at(number: signal.Signals, work: str) -> None:
    code = START + (
        "when_stopped(lambda: 1 / 0)()\n"
        "when_stopped(lambda: 1 / 0)\n"
        "when_stopped(lambda: (time.sleep(0.1), print('told', flush=True)))\n"
        "try:\n"
        "    with PromptStop(0.3):\n"
        "        print('begun', flush=True)\n"
        f"        {work}\n"
        "except Stopped as stop:\n"
        "    sys.exit(stop.exit_code)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)  # it is at its work now
    began = time.monotonic()
    for _ in range(3):  # a launcher may send it several times
        process.send_signal(number)
        time.sleep(0.02)
    done, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert (process.returncode, said) == (128 + number, f"{SAID}\n")
    assert done == "told\n"


def test_whoever_is_not_to_hear_of_his_terminals_end_does_not() -> None:
    code = START + (
        "import os, signal\n"
        "from pipeline.train.preemption import StopRequest\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with PromptStop(0.3):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    time.sleep(0.5)\n"
        "    with StopRequest() as request:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        assert request.signal == 0\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.5)\n"  # it is to be noted alone
        "        assert request.signal == signal.SIGTERM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_two_signals_at_the_same_instant() -> None:
    """As SLURM sends SIGTERM to a job whose script passes on what it hears."""
    code = (
        START + "import os, signal\n"
        "both = {signal.SIGUSR1, signal.SIGTERM}\n"
        "try:\n"
        "    with PromptStop():\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "        for number in both:\n"
        "            os.kill(os.getpid(), number)\n"
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\n"
        "        time.sleep(60)\n"
        "except Stopped as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(stop.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGUSR1, f"{SAID}\n")


def test_it_ends_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    monkeypatch.setattr(os, "_exit", end)
    given, told = os.pipe()
    os.write(told, bytes([signal.SIGTERM]))
    with pytest.raises(SystemExit, match="143"):
        PromptStop(0)._watch(given)
    os.close(given)
    os.close(told)


def test_what_was_before_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = threading.active_count()
    with PromptStop():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert capsys.readouterr().err == ""


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with PromptStop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
