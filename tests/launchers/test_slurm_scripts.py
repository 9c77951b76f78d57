"""The batch scripts by themselves, with stand-ins for SLURM's commands; a real one has them in train and encode."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from monitoring import wait_until

pytestmark = pytest.mark.alone

LAUNCHERS = Path(__file__).parents[2] / "launchers"
TRAIN, ENCODE = LAUNCHERS / "slurm_train.sh", LAUNCHERS / "slurm_encode.sh"
STANDS_IN = """#!/bin/bash
# Tells how it was called, and does what the test says.
printf '%s NODES=%s MASTER=%s:%s CPUS=%s |' \\
  "${{0##*/}}" "$NODES" "$MASTER_ADDR" "$MASTER_PORT" "$SRUN_CPUS_PER_TASK" >> {log}
printf ' <%s>' "$@" >> {log}
echo >> {log}
{does}
"""
PYTHON = 'case "$*" in *attempts*) exit {verdict} ;; *) exec {python} "$@" ;; esac'


class Cluster:
    """A job's environment, with commands that stand in for SLURM's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "called"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LATHE_", "MASTER_"))}
        path = f"{folder / 'bin'}:{kept['PATH']}"
        self.environment = {**kept, "PATH": path, "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "gpu[3-4]"}
        self.environment |= {"SLURM_JOB_NUM_NODES": "2", "PYTHONPATH": str(LAUNCHERS.parent)}
        self.environment["PYTHON"] = str(folder / "bin" / "python")
        (folder / "bin").mkdir()
        self.stand_in("python", PYTHON.format(verdict=75, python=sys.executable))
        self.stand_in("squeue", "echo RUNNING None")
        self.stand_in("scontrol", 'if [[ $1 == show ]]; then printf "gpu3\\ngpu4\\n"; fi')
        self.stand_in("srun", "exit 0")

    def stand_in(self, name: str, does: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(STANDS_IN.format(log=shlex.quote(str(self.log)), does=does))
        file.chmod(0o755)

    def start(self, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: Path, *arguments: str, code: int = 0, **environment: str) -> str:
        """What a script says; it ends with an exit code."""
        job = self.start(script, *arguments, **environment)
        said = job.communicate(timeout=60)[0]
        assert job.returncode == code, said
        return said

    def calls(self, name: str) -> list[str]:
        """The first lines of a command's arguments, each in brackets."""
        return [line.partition(" | ")[2] for line in self._lines(name)]

    def environments(self) -> list[str]:
        return [line.partition(" |")[0].removeprefix("srun ") for line in self._lines("srun")]

    def requeued(self) -> list[str]:
        return [call for call in self.calls("scontrol") if call.startswith("<requeue>")]

    def _lines(self, name: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(f"{name} NODES=")]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    return Cluster(folder)


@pytest.mark.parametrize("script", [TRAIN, ENCODE])
def test_usage(cluster, script):
    assert f"launchers/{script.name} CONFIG" in cluster.run(script, code=2)
    shown = cluster.run(script, "--help")
    assert "LATHE_RETRIES" in shown
    assert "#" not in shown
    assert "trap" not in shown


@pytest.mark.parametrize("script", [TRAIN, ENCODE])
def test_mistakes_are_told_before_anything_is_started(cluster, script):
    assert cluster.run(script, "run.yaml", code=2, SLURM_JOB_ID="").startswith("error: this is no SLURM job\n")
    assert cluster.run(script, "run.yaml", code=2, LATHE_RETRIES="-1").startswith("error: LATHE_RETRIES=-1 is not")
    copy = shutil.copy(script, cluster.folder / "slurm_script")  # as SLURM does
    assert "has no Lathe\n" in cluster.run(Path(copy), "run.yaml", code=5, PYTHON="/bin/false")
    assert not cluster.calls("srun")


@pytest.mark.parametrize("script", [TRAIN, ENCODE])
def test_a_copy_finds_what_lies_beside_the_script(cluster, script):
    copy = shutil.copy(script, cluster.folder / "slurm_script")
    cluster.run(Path(copy), "run.yaml", "caption=it's; $(false)\n*")
    (call,) = cluster.log.read_text().split("srun ")[1:]
    assert call.endswith(" <run.yaml> <caption=it's; $(false)\n*>\n")


def test_where_the_interpreter_alone_is_in_a_container_the_launcher_is_the_machines(cluster):
    """As with Apptainer: the image's launcher is a path that nobody outside has."""
    cluster.stand_in("srun", 'while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"')
    cluster.stand_in("python", 'case "$*" in *bundled*) echo /in/the/image/accelerate.sh ;; esac')
    cluster.run(TRAIN, "run.yaml")
    (started,) = (call for call in cluster.calls("python") if "runtime.launch" in call)
    assert started.startswith("<-m> <pipeline.runtime.launch> <accelerate> ")
    assert started.endswith(" <train> <run.yaml>")


def test_where_ranks_meet_and_on_how_many_cpus(cluster):
    cluster.run(TRAIN, "run.yaml")
    cluster.run(TRAIN, "run.yaml", SLURM_RESTART_COUNT="1")
    cluster.run(TRAIN, "run.yaml", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    cluster.run(TRAIN, "run.yaml", SLURM_CPUS_PER_TASK="32")
    assert cluster.environments() == [
        "NODES=2 MASTER=gpu3:11120 CPUS=",
        "NODES=2 MASTER=gpu3:11121 CPUS=",
        "NODES=2 MASTER=10.0.0.1:1234 CPUS=",
        "NODES=2 MASTER=gpu3:11120 CPUS=32",
    ]


def test_options_of_srun(cluster):
    cluster.stand_in("srun", 'case "$*" in *attempts*) exit 75 ;; *) exit 1 ;; esac')
    cluster.run(ENCODE, "run.yaml", code=75, LATHE_SRUN_OPTIONS="\n--container-image=a b\n\n--label\n")
    step, decision = cluster.calls("srun")
    assert step.startswith("<--kill-on-bad-exit=0> <--wait=1200> <--container-image=a b> <--label> <--ntasks=1> ")
    assert decision.startswith("<--nodes=1> <--ntasks=1> <--overlap> <--container-image=a b> <--label> ")
    assert "<pipeline.encode.attempts> <--code> <1> <--job> <70> <--retries> <3>" in decision


def test_what_has_finished_asks_nobody_and_leaves_nothing(cluster):
    record = cluster.folder / "lathe-70.attempts.json"
    record.touch()
    cluster.run(TRAIN, "run.yaml")
    assert not record.exists()
    assert not [call for call in cluster.calls("python") if "attempts" in call]
    assert not cluster.requeued()


@pytest.mark.parametrize("state", ["RUNNING None", "COMPLETING TimeLimit"])
def test_what_may_start_again_is_requeued(cluster, state):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("squeue", f"echo {state}")
    cluster.run(TRAIN, "run.yaml", code=75)
    assert cluster.requeued() == ["<requeue> <70>"]


@pytest.mark.parametrize(("verdict", "minutes"), [(76, 5), (77, 10), (80, 80)])
def test_the_more_starts_in_a_row_have_failed_the_later_is_the_next_one(cluster, verdict, minutes):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("python", PYTHON.format(verdict=verdict, python=sys.executable))
    assert f"not before {minutes} minutes from now\n" in cluster.run(TRAIN, "run.yaml", code=75)
    assert cluster.calls("scontrol")[-2:] == ["<requeue> <70>", f"<update> <JobId=70> <StartTime=now+{minutes}minutes>"]
    cluster.stand_in("scontrol", "case $1 in show) echo gpu3 ;; update) exit 1 ;; esac")
    assert "not before" not in cluster.run(TRAIN, "run.yaml", code=75)  # at once is better than not


def test_what_slurm_sends_to_all_that_is_left_does_not_end_the_decision(cluster):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in(
        "python", f'case "$*" in *attempts*) kill -TERM $$; exit 75 ;; *) exec {sys.executable} "$@" ;; esac'
    )
    cluster.stand_in("squeue", "echo COMPLETING TimeLimit")
    cluster.run(TRAIN, "run.yaml", code=75)
    assert cluster.requeued()


STEPS = """
echo >> "$0.asked"
case "$* $(wc -l < "$0.asked")" in
  *" step 70 1") echo "StepId=70.batch State=RUNNING" ;; # the tasks have not begun yet
  *" step 70 3") echo "Unable to contact slurm controller" >&2; exit 1 ;;
  *" step 70 "[245]) printf 'StepId=70.batch State=RUNNING\\nStepId=70.1 State=RUNNING\\n' ;;
  *" step 70 "*) echo "StepId=70.batch State=RUNNING" ;;
  *) rm "$0.asked"; echo gpu3 ;;
esac
"""


def test_an_srun_that_does_not_hear_of_the_end_of_its_tasks_is_killed(cluster):
    cluster.stand_in("sleep", "exec /bin/sleep 0.05")
    cluster.stand_in("scontrol", STEPS)
    cluster.stand_in("srun", "exec /bin/sleep 50")
    said = cluster.run(TRAIN, "run.yaml", code=75)
    assert "all tasks of srun have ended, and it has not heard of it: it is killed\n" in said
    assert len([call for call in cluster.calls("scontrol") if "<step>" in call]) == 6
    assert "<--code> <137>" in next(call for call in cluster.calls("python") if "attempts" in call)


def test_on_one_node_srun_hears_of_everything(cluster):
    cluster.stand_in("sleep", "exec /bin/sleep 0.05")
    cluster.stand_in("srun", "/bin/sleep 0.5")
    cluster.run(ENCODE, "run.yaml", SLURM_JOB_NUM_NODES="1")
    assert not cluster.calls("scontrol")


def test_of_an_array_one_task_is_requeued(cluster):
    cluster.stand_in("srun", "exit 137")
    cluster.run(ENCODE, "run.yaml", code=75, SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    assert cluster.requeued() == ["<requeue> <70_3>"]
    assert cluster.calls("squeue")[0].startswith("<--noheader> <--jobs=70_3>")


def test_what_is_left_of_an_array_around_the_submission_is_not_believed(cluster):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("scontrol", 'if [[ $1 == --oneliner ]]; then echo "JobId=70 JobName=x"; fi')
    cluster.run(ENCODE, "run.yaml", code=75, SLURM_ARRAY_JOB_ID="60", SLURM_ARRAY_TASK_ID="3")
    assert cluster.requeued() == ["<requeue> <70>"]


def test_what_may_not_start_again_ends_with_its_code(cluster):
    cluster.stand_in("srun", "exit 4")
    cluster.stand_in("python", PYTHON.format(verdict=4, python=sys.executable))
    cluster.run(TRAIN, "run.yaml", code=4)
    assert not cluster.requeued()


@pytest.mark.parametrize("state", ["COMPLETING None", "COMPLETING NodeDown", "PENDING BeginTime", ""])
def test_a_job_that_slurm_ends_is_left_alone(cluster, state):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("squeue", f"echo {state}")
    assert f"not requeued: SLURM is ending this job itself ({state})\n" in cluster.run(TRAIN, "run.yaml", code=137)
    assert not cluster.requeued()


def test_slurm_that_does_not_answer(cluster):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("scontrol", "if [[ $1 == show ]]; then echo gpu3; else exit 1; fi")
    assert "error: SLURM did not requeue job 70\n" in cluster.run(TRAIN, "run.yaml", code=137)
    cluster.stand_in("sleep", "exit 0")
    cluster.stand_in("squeue", "exit 1")
    assert "error: SLURM has not told the state of job 70" in cluster.run(TRAIN, "run.yaml", code=137)


def test_a_controller_that_is_away_as_a_start_ends_is_waited_for(cluster):
    cluster.stand_in("srun", "exit 137")
    cluster.stand_in("sleep", "exit 0")
    cluster.stand_in("squeue", 'echo >> "$PWD/asked"; (($(wc -l < "$PWD/asked") > 2)) && echo RUNNING None')
    cluster.run(TRAIN, "run.yaml", code=75)
    assert cluster.requeued() == ["<requeue> <70>"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_go_on_as_usr1_and_the_end_is_waited_for(cluster, number):
    step = "trap 'echo heard; sleep 0.3; exit 5' USR1; echo begun; while :; do sleep 0.05; done"
    cluster.stand_in("srun", step)
    cluster.stand_in("python", PYTHON.format(verdict=5, python=sys.executable))
    job = cluster.start(TRAIN, "run.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    for _ in range(3):
        job.send_signal(number)
    said = job.communicate(timeout=60)[0]
    assert (job.returncode, said) == (5, "heard\n")


def test_a_signal_that_srun_drops_is_sent_again(cluster):
    """Before its tasks run, srun hears signals and does nothing."""
    cluster.stand_in("sleep", "exec /bin/sleep 0.2")
    step = "n=0; trap 'n=$((n + 1)); echo heard; ((n < 3)) || exit 138' USR1; echo begun; "
    cluster.stand_in("srun", step + "while :; do /bin/sleep 0.05; done")
    job = cluster.start(TRAIN, "run.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[0]
    assert (job.returncode, said) == (75, "heard\n" * 3)


def test_asked_before_there_is_a_step_none_is_started(cluster):
    cluster.stand_in("scontrol", "if [[ $1 == show ]]; then sleep 1; echo gpu3; fi")
    job = cluster.start(TRAIN, "run.yaml")
    wait_until(lambda: cluster.calls("scontrol"), 30, "the script to begin")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 75
    assert not cluster.calls("srun")
    decision = next(call for call in cluster.calls("python") if "attempts" in call)
    assert "<--code> <138>" in decision
    assert decision.endswith("<--asked> <run.yaml>")


@pytest.mark.parametrize(("code", "is_asked"), [(138, True), (143, True), (137, False), (1, False)])
def test_a_run_that_was_asked_to_stop_as_it_began_has_not_failed(cluster, code, is_asked):
    """There is no requeue file then: it is asked about as what it is."""
    cluster.stand_in("srun", f"trap 'exit {code}' USR1; echo begun; while :; do sleep 0.05; done")
    job = cluster.start(TRAIN, "run.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    (decision,) = [call for call in cluster.calls("python") if "attempts" in call]
    assert ("<--asked>" in decision) == is_asked


def test_a_signal_that_ends_python_before_the_launcher_is_known_is_no_fault_of_the_set_up(cluster):
    cluster.stand_in("srun", 'while [[ $1 != bash ]]; do shift; done; exec "$@"')
    for ends, code in (("kill -USR1 $$", 138), ("exit 1", 5)):
        cluster.stand_in("python", f'case "$*" in *attempts*) exit {code} ;; *) {ends} ;; esac')
        cluster.run(TRAIN, "run.yaml", code=code)
        assert f"<--code> <{code}>" in cluster.calls("python")[-1]


def test_ranks_that_do_not_end_when_their_time_is_over_are_not_waited_for(cluster):
    """SLURM would kill the script with them, and nobody asked for another start."""
    cluster.stand_in("sleep", "exec /bin/sleep 0.2")
    cluster.stand_in("squeue", 'case "$*" in *%T*) echo COMPLETING TimeLimit ;; *) echo TimeLimit ;; esac')
    cluster.stand_in("srun", "trap '' USR1; echo begun; exec /bin/sleep 50")
    job = cluster.start(TRAIN, "run.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGTERM)
    assert "its time is over: " in job.communicate(timeout=40)[0]
    assert job.returncode == 75
    assert cluster.requeued()
    assert "<--code> <137>" in next(call for call in cluster.calls("python") if "attempts" in call)


def test_a_worker_that_was_asked_to_stop_may_always_start_again(cluster):
    cluster.stand_in("srun", "trap 'exit 138' USR1; echo begun; while :; do sleep 0.05; done")
    job = cluster.start(ENCODE, "run.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    (decision,) = [call for call in cluster.calls("python") if "attempts" in call]
    assert "<--asked> <run.yaml>" in decision
