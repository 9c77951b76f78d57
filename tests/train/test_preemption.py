"""Signals that ask to stop, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, signal
from pipeline.train.preemption import StopRequest
with StopRequest() as request:
    assert request.signal == 0
    os.kill(os.getpid(), signal.{first})
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.signal == signal.{first}, request.signal
os.kill(os.getpid(), signal.SIGINT)
print("to its end")
"""


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_the_first_signal_counts_and_later_ones_do_nothing(first):
    done = subprocess.run([sys.executable, "-c", CODE.format(first=first)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("to its end\n", 0), done.stderr


def test_without_a_signal_handlers_are_as_before():
    code = """
import signal
from pipeline.train.preemption import StopRequest
before = signal.getsignal(signal.SIGINT)
with StopRequest():
    assert signal.getsignal(signal.SIGINT) is not before
assert signal.getsignal(signal.SIGINT) is before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rank_that_ends_with_an_error_is_not_ended_before_it_has_said_so():
    code = """
import os, signal
from pipeline.train.preemption import StopRequest
try:
    with StopRequest():
        raise ValueError
except ValueError:
    os.kill(os.getpid(), signal.SIGTERM)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
