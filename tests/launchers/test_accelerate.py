"""The launcher script, as far as it goes before ranks start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launchers/accelerate.sh"

INTERPRETER = """#!/bin/sh
# Stands in for python: passes on what the script asks before the launch, and tells what it would launch.
case "$2" in
  pipeline.runtime.launch) echo "OMP_NUM_THREADS=$OMP_NUM_THREADS DS_ACCELERATOR=$DS_ACCELERATOR $*" ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def config(tmp_path) -> Path:
    file = tmp_path / "my run.yaml"
    file.write_text("job: train\nmanifest: m\noutput: o\n")
    return file


def launch(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable))
    python.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("NPROC", "MASTER_PORT", "OMP_NUM_THREADS")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**kept, "PYTHON": str(python), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("ranks", ["0", "-1", "x", "1.5", " "])
def test_a_number_of_ranks_that_is_none(tmp_path, config, ranks):
    done = launch(tmp_path, str(config), NPROC=ranks)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: NPROC={ranks} is not a number of ranks\n")


def test_environment_becomes_arguments(tmp_path, config):
    done = launch(tmp_path, str(config), "steps=5", NPROC="3", MASTER_PORT="1234", OMP_NUM_THREADS="7")
    assert done.returncode == 0, done.stderr
    assert "--num_processes 3 --num_machines 1 --main_process_port 1234" in done.stdout
    assert "OMP_NUM_THREADS=7" in done.stdout
    assert done.stdout.rstrip().endswith(f"-m pipeline train {config} steps=5")


def test_defaults(tmp_path, config):
    done = launch(tmp_path, str(config))
    words = done.stdout.split()
    assert int(words[words.index("--num_processes") + 1]) >= 1
    assert int(words[words.index("--main_process_port") + 1]) > 1023


def test_a_mistake_in_the_run_file_ends_it_before_any_rank_starts(tmp_path, config):
    done = launch(tmp_path, str(config), "stps=5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {config}: stps: unknown field\n")


def test_usage(tmp_path):
    assert launch(tmp_path).returncode == 2
    shown = launch(tmp_path, "--help")
    assert shown.returncode == 0
    assert "launchers/accelerate.sh CONFIG" in shown.stdout
    assert "NPROC" in shown.stdout
