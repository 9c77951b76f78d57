"""Processes ended by the kernel's out-of-memory killer are told from those that somebody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.runtime import kernel_kills

ROOT = Path(__file__).parents[2]
V2 = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.events": "oom 2\noom_kill 3\n"}
V2_CONTAINER = {"proc/self/cgroup": "0::/../job\n", "sys/fs/cgroup/memory.events": "oom 9\noom_kill 3\n"}
V1 = {
    "proc/self/cgroup": "4:memory:/job\n1:cpu:/\n0::/\n",
    "sys/fs/cgroup/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
}


@pytest.mark.parametrize("files", [V2, V2_CONTAINER, V1], ids=["v2", "container", "v1"])
def test_the_groups_count_and_the_machines(tmp_path, files):
    for name, text in {**files, "proc/vmstat": "nr_free_pages 1\noom_kill 11\n"}.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert kernel_kills.counts(tmp_path) == {"this job's memory limit": 3, "this machine's memory": 11}


def test_where_nothing_counts_nothing_is_said(tmp_path):
    assert kernel_kills.counts(tmp_path) == {}
    assert kernel_kills.since({}, {}) == ""
    assert kernel_kills.since({}, {"this machine's memory": 7}) == ""


def test_what_is_said():
    before = {"this job's memory limit": 3, "this machine's memory": 11}
    assert kernel_kills.since(before, before) == ""
    assert kernel_kills.since(before, {"this job's memory limit": 4, "this machine's memory": 12}) == (
        "the kernel ended 1 process for want of this job's memory limit meanwhile, and this may be one"
    )
    assert "2 processes for want of this machine's memory" in kernel_kills.since(
        before, {**before, "this machine's memory": 13}
    )


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a limit of 2 GiB."""
    version_1 = Path("/sys/fs/cgroup/memory")
    base, limit = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_1.parent, "memory.max")
    group = base / f"lathe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"no control group with a limit can be made: {error}")
    yield group
    group.rmdir()


@pytest.mark.ranks
def test_a_rank_that_takes_more_memory_than_there_is(tmp_path, group):
    script = tmp_path / "rank.py"
    script.write_text("taken = []\nwhile True:\n    taken.append(bytearray(16 << 20))\n")
    options = "--use_deepspeed --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -m pipeline.runtime.launch accelerate {options}"
    done = subprocess.run(
        ["bash", "-c", f"{command} --main_process_port 0 {script}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 137
    assert (
        "error: rank 0 was ended by SIGKILL, and the other ranks with it\n  the kernel ended 1 process for want of this"
        in done.stderr
    )
