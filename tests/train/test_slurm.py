"""T1 on a real SLURM: a run of two nodes that is preempted, killed and requeued has the bits of an undisturbed one."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from monitoring import wait_until
from slurm import HOST, Slurm
from training_run import ROOT, Run, finish

from pipeline.metrics import read_log

pytestmark = [pytest.mark.slurm, pytest.mark.ranks]
STEPS, EVERY = 80, 10
SCRIPT = ROOT / "launchers/slurm_train.sh"
CHANGES: dict[str, Any] = {"steps": STEPS, "checkpoint": {"every": EVERY, "keep": 2}}


class Job:
    """A run of two nodes, one rank each."""

    def __init__(self, cluster: Slurm, run: Run, *, options: tuple[str, ...] = (), **environment: str) -> None:
        self.cluster, self.run, self.output = cluster, run, run.file.with_name("said")
        self.number = cluster.submit(
            SCRIPT,
            str(run.file),
            options=["--nodes=2", f"--output={self.output}", f"--chdir={run.file.parent}", *options],
            PYTHON=sys.executable,
            PYTHONPATH=str(ROOT),
            NPROC="1",
            MASTER_ADDR=HOST,
            LATHE_INTERFACE="lo",
            OMP_NUM_THREADS="1",
            **environment,
        )

    def wait_for_step(self, step: int, start: int) -> None:
        """Until a step is logged by a start, counted from 0."""

        def is_logged() -> bool:
            assert int(self.state()["Restarts"]) == start, self.said()
            return self.state()["JobState"] not in ("FAILED", "COMPLETED") and self.run.has_logged(step, self._begun)

        self.cluster.wait_for_start(self.number, start)
        self._begun = time.time()
        wait_until(is_logged, 240, f"step {step}")

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ranks(self, node: str = "") -> list[psutil.Process]:
        return [process for process in self.cluster.processes(node) if "RANK" in process.environ()]

    def ended(self, state: str = "COMPLETED") -> dict[str, str]:
        """What SLURM tells of the job once it has ended."""
        found = self.cluster.wait_for(self.number)
        assert found["JobState"] == state, self.said() + self.cluster.logs()
        return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory, make_latents) -> Run:
    """What the two ranks do undisturbed, on one machine."""
    folder = tmp_path_factory.mktemp("reference")
    run = Run(folder, make_latents(folder / "latents"), **CHANGES)
    finish(run.start())
    return run


def same(run: Run, reference: Run) -> None:
    assert run.losses() == reference.losses()
    assert len(run.losses()) == STEPS
    assert run.state(STEPS) == reference.state(STEPS)


def test_preempted_killed_and_requeued_it_has_the_same_bits(slurm, tmp_path, reference):
    run = Run(tmp_path / "it's a run; $(false)", reference.latents, **CHANGES)
    job = Job(slurm, run)
    job.wait_for_step(EVERY, 0)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.number))
    slurm.wait_for_start(job.number, 1)
    (stopped_at,) = run.steps()[:1]
    job.wait_for_step(stopped_at + EVERY, 1)
    (rank,) = job.ranks("node2")
    rank.kill()
    slurm.wait_for_start(job.number, 2)
    found = job.ended()
    print(job.said())
    same(run, reference)
    assert found["Restarts"] == "2"
    assert [line["restarts"] for line in read_log(run.store)][-1] == 2
