"""A run on two machines, each with a launcher of its own: exact, stopped at either, with the link between them cut."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import NEEDED, Host, available, hosts
from training_run import ROOT, STEPS, Run, finish

from pipeline.metrics import read_log

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not available(), reason=NEEDED)]
PORT = 29500  # of hosts that nobody else is on
TIME_OUT, SLACK = 8, 10  # seconds; the second for the end of processes on a machine that is busy
CUT_SECONDS = 5


@pytest.fixture
def machines() -> Iterator[list[Host]]:
    with hosts(2) as made:
        yield made


def requeue_file(run: Run, machine: int) -> Path:
    return run.file.with_name(f"requeue.{machine}.json")


def start(
    run: Run, machines: list[Host], *overrides: str, script: str = "accelerate.sh"
) -> list[subprocess.Popen[str]]:
    """A launcher on each machine, of one rank."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "DS_ACC", "GLOO_", "NCCL_"))}
    kept |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "NPROC": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"NODES": "2", "MASTER_ADDR": machines[0].address, "MASTER_PORT": str(PORT)}
    return [
        subprocess.Popen(
            host.inside("bash", str(ROOT / "launchers" / script), str(run.file), *overrides),
            env={**kept, "NODE_RANK": str(number), "LATHE_REQUEUE_FILE": str(requeue_file(run, number))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, host in enumerate(machines)
    ]


def end(launchers: list[subprocess.Popen[str]]) -> None:
    for launcher in launchers:
        launcher.kill()
        launcher.wait()


def test_stopped_at_the_second_machine_and_cut_off_for_seconds_it_ends_as_on_one(
    tmp_path, latents, machines, undisturbed
):
    run = Run(tmp_path, latents)
    launchers = start(run, machines)
    try:
        run.wait_for_step(3, launchers[0])
        launchers[1].send_signal(signal.SIGUSR1)
        said = [finish(launcher, 128 + signal.SIGUSR1) for launcher in launchers]
        assert not any("error" in text for text in said)
        assert json.loads(requeue_file(run, 0).read_text())["signal"] == "SIGUSR1"
        assert not requeue_file(run, 1).exists()
        done = run.steps()[0]

        launchers = start(run, machines)
        run.wait_for_step(done + 3, launchers[0])
        machines[1].cut()
        time.sleep(CUT_SECONDS)
        machines[1].mend()
        for launcher in launchers:
            finish(launcher)
    finally:
        end(launchers)
    assert run.losses() == undisturbed.losses()
    assert run.state(STEPS) == undisturbed.state(STEPS)
    times = [line["time"] for line in read_log(run.store) if "loss" in line and line["step"] > done]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) > CUT_SECONDS - 1
    assert not requeue_file(run, 0).exists()


def test_cut_off_for_good_both_end_within_the_time_out(tmp_path, latents, machines):
    run = Run(tmp_path, latents, engine={"zero_stage": 0, "threads_per_rank": 1, "timeout_seconds": TIME_OUT})
    launchers = start(run, machines, "steps=1000000", "checkpoint.every=1000000", script="torchrun.sh")
    try:
        run.wait_for_step(3, launchers[0])
        time.sleep(2.5)  # until they have left their places
        since = time.monotonic()
        machines[1].cut()
        for launcher in launchers:
            said = finish(launcher, 1)
            assert time.monotonic() - since < TIME_OUT + SLACK
            (line,) = re.findall("^error: .*$", said, re.MULTILINE)
            assert line.startswith("error: lost another rank: ")
            assert "; last seen: rank" in line
            assert said.endswith(
                "\n  the rank that ended first says why; the same command goes on from the last checkpoint\n"
            )
    finally:
        end(launchers)
