"""Two real ranks whose disk is full or whose S3 server is gone while a checkpoint is stored, and killed meanwhile."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
from training_run import STEPS, Run, finish, ranks_of

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.storage import Lease
from pipeline.train import checkpoint

pytestmark = pytest.mark.ranks

MANY = 100  # quick steps fail many times before anybody can react
TOLD = f"could not be saved, training goes on (1 of {MANY} in a row)"


def said_until(child: subprocess.Popen[str], words: str) -> str:
    said = ""
    assert child.stdout is not None
    while words not in said:
        line = child.stdout.readline()
        assert line, said
        said += line
    return said


def wait_for_checkpoint(run: Run, child: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 120
    while not (found := run.steps()):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found[0]


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_step(undisturbed, tmp_path):
    run = Run(tmp_path, undisturbed.latents)
    child = run.launch("checkpoint.every=2", "checkpoint.keep=100", f"checkpoint.max_failures={MANY}")
    first = wait_for_checkpoint(run, child)
    (last,) = (rank for rank in ranks_of(child) if rank.environ()["RANK"] == "1")
    before = last.rlimit(psutil.RLIMIT_FSIZE)
    last.rlimit(psutil.RLIMIT_FSIZE, (4096, before[1]))  # the system refuses longer files
    said = said_until(child, TOLD)
    last.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, before[1]))
    said += child.stdout.readline()  # of another rank
    said += finish(child)
    assert re.search(r"/rank-00001-of-00002\.\S+: no room to write it \(File too large", said), said
    assert said.count(TOLD) == 1
    steps = run.steps()
    assert first in steps
    assert steps[0] == STEPS
    assert len(steps) < STEPS // 2
    assert run.losses() == undisturbed.losses()
    assert run.state(STEPS) == undisturbed.state(STEPS)
    folders = {path.name for path in run.output.glob("step-*")}
    assert folders == {checkpoint.step_name(step) for step in steps}  # nothing is left of the others


@pytest.fixture
def own_server(tmp_path, monkeypatch) -> Iterator[EmbeddedObjectStore]:
    with EmbeddedObjectStore(tmp_path / "s3", "own") as server:
        for name, value in {**server.environment(), "LATHE_STORAGE_RETRY_SECONDS": "2"}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.s3
def test_killed_while_it_uploads_then_without_its_server_for_a_while(undisturbed, own_server, tmp_path):
    often = {"every": 2, "keep": 100, "max_failures": MANY}
    run = Run(tmp_path, undisturbed.latents, f"{own_server.url}/run", checkpoint=often)
    killed = run.launch()
    wait_for_checkpoint(run, killed)
    os.kill(own_server.pid, signal.SIGSTOP)  # the upload that comes next does not end
    time.sleep(1.0)
    for rank in ranks_of(killed):
        rank.kill()
    finish(killed, 128 + signal.SIGKILL)
    os.kill(own_server.pid, signal.SIGCONT)
    last = run.steps()[0]
    assert last < STEPS

    child = run.launch()
    said = said_until(child, "going on from")
    assert f"going on from {run.store.url}/{checkpoint.step_name(last)}\n" in said
    deadline = time.monotonic() + 120
    while run.steps()[0] == last:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    own_server.stop()
    said += said_until(child, TOLD)
    own_server.start()
    said += finish(child)
    assert said.count(TOLD) == 1
    assert "Traceback" not in said
    assert run.steps()[0] == STEPS
    assert last in run.steps()
    assert run.losses() == undisturbed.losses()
    assert run.state(STEPS) == undisturbed.state(STEPS)


def test_a_second_run_on_the_same_output_is_refused(undisturbed, tmp_path):
    run = Run(tmp_path, undisturbed.latents)
    held = Lease(run.store)
    held.take()
    try:
        said = finish(run.launch(), 1)
    finally:
        held.release()
    assert f"error: {run.output} is being written to by process {os.getpid()} on {os.uname().nodename}\n" in said
    assert said.count("error: ") == 1
    assert run.steps() == []
