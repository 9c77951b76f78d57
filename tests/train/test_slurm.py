"""T1 on a real SLURM: a run of two nodes that is preempted, killed and requeued has the bits of an undisturbed one."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from hosts import NEEDED, Host, available, hosts
from monitoring import wait_until
from slurm import Slurm
from training_run import ROOT, Run, finish, is_rank

from pipeline.metrics import read_log

pytestmark = [pytest.mark.slurm, pytest.mark.ranks]
STEPS, EVERY = 80, 10
SCRIPT = ROOT / "launchers/slurm_train.sh"
CHANGES: dict[str, Any] = {"steps": STEPS, "checkpoint": {"every": EVERY, "keep": 2}}
TIME_OUT, SLACK = 12, 10  # seconds; the second for the end of processes on a machine that is busy
QUICK = {"threads_per_rank": 1, "timeout_seconds": TIME_OUT}


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
            OMP_NUM_THREADS="1",
            **{**cluster.network, **environment},
        )

    def wait_for_step(self, step: int, start: int) -> None:
        """Until a step is logged by a start, counted from 0."""

        def is_logged() -> bool:
            state = self.state()
            assert int(state["Restarts"]) == start, self.said()
            assert state["JobState"] == "RUNNING", self.said()
            return self.run.has_logged(step, self._begun)

        self.cluster.wait_for_start(self.number, start)
        self._begun = time.time()
        wait_until(is_logged, 240, f"step {step}")

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def ranks(self, node: str = "") -> list[psutil.Process]:
        return [process for process in self.cluster.processes(node) if is_rank(process)]

    def launcher(self, node: str) -> psutil.Process:
        (rank,) = self.ranks(node)
        found = rank.parent()
        assert found is not None
        return found

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
    found = job.ended()
    same(run, reference)
    said = job.said()
    assert f"stopped by SIGUSR1 after step {stopped_at}; " in said
    assert "starting again: it was asked to stop\n" in said
    assert "starting again: exit code 137, and it has come on since the last start\n" in said
    assert found["Restarts"] == "2"  # SLURM_RESTART_COUNT of the last start
    assert read_log(run.store)[-1]["restarts"] == 2
    assert not list(run.file.parent.glob("lathe-*"))


def lose(slurm: Slurm, job: Job, node: str) -> None:
    """A node's machine loses its power, and is there again after SLURM has noticed."""
    slurm.lose_node(node)
    wait_until(lambda: int(job.state()["Restarts"]) >= 1, 120, "the job to be requeued")
    slurm.start_node(node)


DISTURBANCES: dict[str, Callable[[Slurm, Job], object]] = {
    "SIGTERM to the script": lambda slurm, job: slurm.run("scancel", "--batch", "--signal=TERM", str(job.number)),
    "SIGUSR1 to the ranks alone": lambda slurm, job: slurm.run("scancel", "--signal=USR1", str(job.number)),
    "scontrol requeue": lambda slurm, job: slurm.run("scontrol", "requeue", str(job.number)),
    "a node is lost": lambda slurm, job: lose(slurm, job, "node2"),
    "the script's node is lost": lambda slurm, job: lose(slurm, job, "node1"),
    "a node's launcher is killed": lambda slurm, job: job.launcher("node2").kill(),
}


@pytest.mark.long
@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_whatever_ends_a_start_the_next_one_goes_on(slurm, tmp_path, reference, disturbance):
    run = Run(tmp_path, reference.latents, **CHANGES)
    job = Job(slurm, run)
    job.wait_for_step(EVERY + 1, 0)
    wait_until(run.steps, 30, "a checkpoint")
    DISTURBANCES[disturbance](slurm, job)
    assert int(job.ended()["Restarts"]) >= 1
    same(run, reference)


@pytest.mark.long
@pytest.mark.parametrize("seconds", [0, 1, 5])
def test_asked_to_stop_at_any_instant_it_is_requeued(slurm, tmp_path, reference, seconds):
    run = Run(tmp_path, reference.latents, **CHANGES)
    job = Job(slurm, run, LATHE_SRUN_OPTIONS="--label\n--cpu-bind=none")
    slurm.wait_for_start(job.number, 0)
    wait_until(job.output.exists, 30, "the script to begin")
    time.sleep(seconds)
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.number))
    slurm.wait_for_start(job.number, 1)
    job.ended()
    same(run, reference)


@pytest.mark.long
def test_when_its_time_is_over_before_it_has_saved_it_is_requeued(tmp_path, tmp_path_factory, reference):
    run = Run(tmp_path / "run", reference.latents, **CHANGES)
    with Slurm(tmp_path_factory.mktemp("slurm"), kill_wait=60) as slurm:
        job = Job(slurm, run, options=("--time=1", "--signal=B:CONT@1"))
        job.wait_for_step(EVERY + 1, 0)
        wait_until(run.steps, 30, "a checkpoint")
        for rank in job.ranks():
            rank.suspend()
        wait_until(lambda: job.state()["Reason"] == "TimeLimit", 180, "its time to be over")
        for rank in job.ranks():
            rank.resume()
        slurm.wait_for_start(job.number, 1)
        slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
        job.ended()
        same(run, reference)


@pytest.mark.long
def test_cancelled_it_stays_so_and_another_job_goes_on(slurm, tmp_path, reference):
    run = Run(tmp_path, reference.latents, **CHANGES)
    job = Job(slurm, run)
    job.wait_for_step(EVERY, 0)
    slurm.run("scancel", str(job.number))
    assert job.ended("CANCELLED")["Restarts"] == "0"
    wait_until(lambda: not slurm.processes("node1") or not job.ranks(), 60, "its ranks to be gone")
    time.sleep(15)  # longer than a requeued job waits
    assert job.state()["JobState"] == "CANCELLED"
    Job(slurm, run).ended()
    same(run, reference)


@pytest.mark.long
def test_it_is_given_up_where_starts_do_not_bring_it_on(slurm, tmp_path, reference):
    run = Run(tmp_path, reference.latents, **{**CHANGES, "checkpoint": {"every": STEPS}, "steps": 1000})
    job = Job(slurm, run, LATHE_RETRIES="1")
    job.wait_for_step(1, 0)
    job.ranks("node2")[0].kill()
    assert 4 < slurm.end_pause(job.number, 1) < 5
    job.wait_for_step(1, 1)
    job.ranks("node2")[0].kill()
    found = job.ended("FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("1", "137:0")
    assert "not started again: exit code 137, and 2 starts in a row have not brought it on\n" in job.said()


@pytest.mark.long
def test_a_node_that_hangs_is_not_waited_for(slurm, tmp_path, reference):
    run = Run(tmp_path, reference.latents, **CHANGES, engine=QUICK)
    job = Job(slurm, run, LATHE_SRUN_OPTIONS="--wait=5")
    job.wait_for_step(EVERY + 1, 0)
    wait_until(run.steps, 30, "a checkpoint")
    (rank,) = job.ranks("node2")
    rank.suspend()
    assert job.ended()["Restarts"] == "1"
    assert "First task exited 5s ago" in job.said()
    same(run, reference)


@pytest.mark.long
def test_a_mistake_in_the_run_file_is_not_tried_again(slurm, tmp_path, reference):
    run = Run(tmp_path, reference.latents, **CHANGES)
    run.file.write_text(run.file.read_text() + "stps: 3\n")
    job = Job(slurm, run)
    found = job.ended("FAILED")
    assert (found["Restarts"], found["ExitCode"]) == ("0", "2:0")
    assert "stps: unknown field" in job.said()
    assert job.said().endswith("not started again: exit code 2: the run file must be mended first\n")


@pytest.fixture
def machines() -> Iterator[list[Host]]:
    """The controller's, and two for nodes."""
    with hosts(3) as made:
        yield made


@pytest.mark.long
@pytest.mark.skipif(not available(), reason=NEEDED)
@pytest.mark.parametrize(
    ("node_timeout", "until", "why"),
    [(30, "PENDING", "DUE TO NODE FAILURE")],
    ids=["until SLURM has missed it"],
)
def test_a_host_is_cut_off_and_once_it_is_back_the_next_start_goes_on(
    tmp_path, tmp_path_factory, reference, machines, node_timeout, until, why
):
    run = Run(tmp_path / "run", reference.latents, **CHANGES, engine=QUICK)
    with Slurm(tmp_path_factory.mktemp("slurm"), hosts=machines, node_timeout=node_timeout) as slurm:
        job = Job(slurm, run)
        job.wait_for_step(EVERY + 1, 0)
        wait_until(run.steps, 30, "a checkpoint")
        assert [len(job.ranks(node)) for node in slurm.nodes] == [1, 1]
        machines[2].cut()
        wait_until(lambda: not job.ranks(), TIME_OUT + SLACK, "the ranks to end")
        assert job.state()["JobState"] == "RUNNING"  # they did so by themselves
        wait_until(lambda: job.state()["JobState"] == until, 3 * node_timeout, f"the job to be {until}")
        machines[2].mend()
        slurm.run("scontrol", "reconfigure")  # by itself SLURM looks after a host that is down every few minutes
        found = job.ended()
    same(run, reference)
    said = job.said()
    (line,) = re.findall("^error: .*$", said, re.MULTILINE)
    assert line.startswith("error: lost another rank: ")
    assert why in said
    assert f"going on from {run.store.url}/step-" in said
    assert found["Restarts"] == "1"
