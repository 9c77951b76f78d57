"""T6: whoever loses a rank ends with a clear message within the time-out: killed, stopped.

Cut off: test_several_machines.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from daemons import free_port
from training_run import ROOT, Run

pytestmark = pytest.mark.ranks
TIME_OUT = 8
SLACK = 6  # seconds for the end of a process on a machine that is busy


def start(run: Run, rank: int, port: int) -> subprocess.Popen[str]:
    """One rank of two, without a launcher that would end it."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    limits = [f"engine.timeout_seconds={TIME_OUT}", "checkpoint.every=1000000", "steps=1000000"]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(run.file), *limits],
        env={**os.environ, **place},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(rank: subprocess.Popen[str], since: float, within: float) -> str:
    """What a rank says of the other; one line and its remedy."""
    said = rank.communicate(timeout=60)[0]
    assert time.monotonic() - since < within
    assert rank.returncode == 1
    (line,) = re.findall("^error: .*$", said, re.MULTILINE)
    assert line.startswith("error: lost another rank: ")
    assert "cc:" not in line
    assert said.endswith("\n  the rank that ended first says why; the same command goes on from the last checkpoint\n")
    return line


@pytest.mark.parametrize(
    ("how", "victim", "engine"),
    [
        pytest.param(signal.SIGKILL, 0, 2, id="kill-0-zero2"),
        pytest.param(signal.SIGSTOP, 1, 0, id="stop-1-ddp"),
        pytest.param(signal.SIGKILL, 1, 0, id="kill-1-ddp", marks=pytest.mark.long),
        pytest.param(signal.SIGSTOP, 0, 3, id="stop-0-zero3", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_is_killed_or_stopped_ends_the_other(tmp_path, latents, how, victim, engine):
    run = Run(tmp_path, latents, engine={"zero_stage": engine, "threads_per_rank": 1})
    port = free_port()
    ranks = [start(run, rank, port) for rank in (0, 1)]
    try:
        run.wait_for_step(3, ranks[0])
        time.sleep(2.5)  # until they have left their places
        since = time.monotonic()
        ranks[victim].send_signal(how)
        within = SLACK + (TIME_OUT if how == signal.SIGSTOP else 0)
        line = ended(ranks[1 - victim], since, within)
        assert re.search("; last seen: rank.* at step [1-9]", line)
        if how == signal.SIGSTOP:
            assert re.search("silent for [1-9] s", line)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
