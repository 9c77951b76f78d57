"""Runs by the launchers that other tests do not use: DeepSpeed's, and accelerate with a file of ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from daemons import free_port
from training_run import ROOT, STEPS, Run, finish

pytestmark = pytest.mark.ranks


def start(run: Run, *command: str, **environment: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")}
    kept |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env={**kept, "LATHE_REQUEUE_FILE": str(requeue_file(run)), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run.file.parent,
    )


def requeue_file(run: Run) -> Path:
    return run.file.with_name("requeue.json")


@pytest.mark.long
def test_deepspeeds_launcher_is_stopped_and_goes_on_as_any_other(tmp_path, latents, undisturbed):
    run = Run(tmp_path, latents)
    hostfile = tmp_path / "host file"
    hostfile.write_text("# one machine\nlocalhost slots=2\n")
    script = ["bash", str(ROOT / "launchers/deepspeed.sh"), str(run.file)]
    launcher = start(run, *script, HOSTFILE=str(hostfile), MASTER_PORT=str(free_port()))
    try:
        run.wait_for_step(3, launcher)
        launcher.send_signal(signal.SIGUSR1)
        assert "error" not in finish(launcher, 128 + signal.SIGUSR1)
        assert json.loads(requeue_file(run).read_text())["signal"] == "SIGUSR1"
        launcher = start(run, *script, "optimizer.learning_rate=-1", HOSTFILE=str(hostfile))
        assert finish(launcher, 2).count("error: ") == 1
        launcher = start(run, *script, HOSTFILE=str(hostfile), MASTER_PORT=str(free_port()))
        finish(launcher)
    finally:
        launcher.kill()
        launcher.wait()
    assert run.losses() == undisturbed.losses()
    assert run.state(STEPS) == undisturbed.state(STEPS)


def test_accelerate_with_our_file_and_nothing_else(tmp_path, latents, undisturbed):
    run = Run(tmp_path, latents)
    words = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launchers/accelerate/cpu.yaml")]
    finish(start(run, sys.executable, *words, "-m", "pipeline", "train", str(run.file), "steps=2"))
    assert run.losses() == undisturbed.losses()[:2]
