"""What SLURM says of jobs, and what becomes of it."""

from __future__ import annotations

import os
import shlex
import socket
from typing import Any

import psutil
import pytest
from launch_files import JOB, written

from pipeline.operate.launch import slurm, submissions
from pipeline.operate.launch import states as states_module
from pipeline.operate.launch.cancelling import cancel
from pipeline.operate.launch.scripts import job_name
from pipeline.operate.launch.states import is_well, page, states


def test_states_of_slurm(submitted, monkeypatch):
    name = {stage.id: job_name(submitted.name, stage.name) for stage in submitted.record.stages}
    array = [(5, "0", "COMPLETED"), (6, "1", "RUNNING"), (7, "2", "PENDING")]
    lines = [JOB.format(job, f"{name['5']} ArrayTaskId={task}", word, "None", 1, "0:0") for job, task, word in array]
    lines.append(JOB.format(5, f"{name['5']} ArrayTaskId=3-7%3", "PENDING", "JobArrayTaskLimit", 0, "0:0"))
    said = {
        "5": "".join(lines),
        "6": JOB.format(6, name["6"], "OUT_OF_MEMORY", "OutOfMemory", 0, "0:125"),
        "7": JOB.format(7, "somebody-else", "RUNNING", "None", 0, "0:0"),
    }

    def ask(program: str, *arguments: str, **_: Any) -> str:
        if program == "sacct":
            raise slurm.SlurmError("Slurm accounting storage is disabled")
        return said[arguments[-1]]

    monkeypatch.setattr(slurm, "ask", ask)
    submitted.log(submitted.record.stages[1]).write_text("step 5\nkilled for memory\n\n")
    submitted.log(submitted.record.stages[2]).write_text("written to x\n")
    encode, learn, export = states(submitted)
    assert (encode.state, encode.said) == (
        "running", "1 of 8 finished, 6 of 8 waiting, 1 of 8 running, for 00:01:02 on n[1-2], 3 restarts")  # fmt: skip
    assert (learn.state, learn.said) == ("failed", "out of memory, signal 125, OutOfMemory")
    assert (export.state, export.said) == (
        "forgotten", "SLURM has no record of it any more; its log ends with: written to x")  # fmt: skip
    told = page(submitted, [encode, learn, export])
    assert f"    step 5\n    killed for memory\n    lathe launch logs {submitted.name} --stage learn\n" in told
    assert not is_well([encode, learn, export])


def test_tasks_that_slurm_forgets_while_others_run(submitted, monkeypatch):
    name = job_name(submitted.name, "encode")
    words = {"6": "RUNNING", "7": "COMPLETED"}
    lines = [JOB.format(5, f"{name} ArrayTaskId={task}", word, "None", 0, "0:0") for task, word in words.items()]
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "".join(lines))
    encode = states(submitted)[0]
    assert (encode.state, encode.said) == (
        "running", "1 of 8 finished, 6 of 8 forgotten, 1 of 8 running, for 00:01:02 on n[1-2]")  # fmt: skip
    del lines[0]
    assert states(submitted)[0].state == "forgotten"


def test_an_array_runs_as_long_as_one_of_its_tasks_does(submitted, monkeypatch):
    """Others may have failed: what is left has to be cancelled, and is gone on with."""
    name = job_name(submitted.name, "encode")
    words = {"0": "FAILED", "1": "RUNNING", "2-7": "PENDING"}
    lines = [JOB.format(5, f"{name} ArrayTaskId={task}", word, "None", 0, "7:0") for task, word in words.items()]
    asked = []

    def ask(*arguments: str, **_: Any) -> str:
        asked.append(arguments)
        return "".join(lines) if arguments[-1] == "5" else ""

    monkeypatch.setattr(slurm, "ask", ask)
    encode = states(submitted)[0]
    assert (encode.state, encode.said) == (
        "running", "1 of 8 failed, 6 of 8 waiting, 1 of 8 running, for 00:01:02 on n[1-2]")  # fmt: skip
    assert cancel(submitted, None) == ["encode"]
    assert asked[-1] == ("scancel", f"--name={name}", "5")
    del lines[1:]
    assert states(submitted)[0].state == "failed"


@pytest.mark.parametrize(
    ("told", "tasks"),
    [("5", {5}), ("3-5%3", {3, 4, 5}), ("0,2,5-6", {0, 2, 5, 6}), ("3-9:3%2", {3, 6, 9}), ("", set())],
)
def test_tasks_of_a_line(told, tasks):
    assert states_module._tasks_of({"ArrayTaskId": told}) == tasks


def test_what_slurm_has_forgotten_its_accounting_knows(submitted, monkeypatch):
    def ask(program: str, *arguments: str, **_: Any) -> str:
        if program == "scontrol":
            raise slurm.SlurmError("scontrol: slurm_load_jobs error: Invalid job id specified")
        stage = next(stage for stage in submitted.record.stages if stage.id == arguments[-1])
        word = {"encode": "COMPLETED", "learn": "FAILED", "export": "CANCELLED by 0"}[stage.name]
        ids = [f"{stage.id}_{task}" for task in range(stage.tasks)] if stage.tasks > 1 else [stage.id]
        name = job_name(submitted.name, stage.name)
        return "".join(f"{job}|{name}|{word}|00:00:09|3:0\n{job}|other|RUNNING|1|0:0\n" for job in ids)

    monkeypatch.setattr(slurm, "ask", ask)
    found = states(submitted)
    assert [one.state for one in found] == ["finished", "failed", "cancelled"]
    assert found[0].said == "8 of 8 finished, took 00:00:09"
    assert found[1].said == "exit code 3"


def test_of_an_array_that_slurm_has_half_forgotten_its_accounting_knows_the_rest(submitted, monkeypatch):
    name = job_name(submitted.name, "encode")
    known = "".join(JOB.format(5, f"{name} ArrayTaskId={task}", "RUNNING", "None", 0, "0:0") for task in (6, 7))
    rows = [f"5_{task}|{name}|{'FAILED' if task == 2 else 'COMPLETED'}|00:00:09|7:0\n" for task in range(7)]
    said = {"scontrol": known, "sacct": "".join(rows)}  # 6 was running when the accounting was written last
    monkeypatch.setattr(slurm, "ask", lambda program, *_, **__: said[program])
    encode = states(submitted)[0]
    assert encode.said == "5 of 8 finished, 1 of 8 failed, 2 of 8 running, for 00:01:02 on n[1-2]"


def test_a_submission_whose_folder_was_renamed_knows_its_jobs(submitted, monkeypatch):
    name = job_name(submitted.name, "learn")
    moved = submissions.load(submitted.folder.rename(submitted.folder.with_name("best")))
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: JOB.format(6, name, "RUNNING", "None", 0, "0:0"))
    assert moved.name == "best"
    assert states(moved)[1].state == "running"


def test_what_is_still_being_submitted_is_not_cancelled(place, monkeypatch):
    submission = written("export.yaml")
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    assert states(submission)[0].state == "cancelled"
    submission.record.process = (os.getppid(), psutil.Process(os.getppid()).create_time())
    submission.record.machine = socket.gethostname()
    assert states(submission)[0].state == "waiting"


def test_a_job_that_was_not_noted_is_found_by_its_name(place, monkeypatch):
    submission = written("export.yaml")
    line = f"JobId=9 JobName={submission.name}.export JobState=PENDING Reason=Priority\n"
    said = {"squeue": "9\n", "scontrol": line}
    monkeypatch.setattr(slurm, "ask", lambda program, *_, **__: said[program])
    assert [(one.record.id, one.state) for one in states(submission)] == [("9", "waiting")]
    said["squeue"] = ""
    assert [(one.record.id, one.state) for one in states(submissions.find(None))] == [("", "cancelled")]


def test_states_are_told_by_scontrol_words_that_slurm_has():
    assert states_module._state("NODE_FAIL") == "failed"
    assert states_module._state("REQUEUED") == "waiting"
    assert states_module._state("SIGNALING") == "running"
    assert states_module._state("PREEMPTED") == "failed"  # for good: one that is queued again is PENDING


def test_a_submission_elsewhere_is_told_by_its_folder(place):
    submission = written("export.yaml", parent=place / "else where")
    failed = states_module.StageState(submission.stage("export"), "failed", "exit code 1")
    assert page(submission, [failed]).endswith(f"    it has no log: can its nodes write to {submission.folder}?")
    said = ["error: old", "  do a", "step 3", "error: new", "  do b", "srun: error: node1: task 0: Exited", "not again"]
    (submission.folder / "export.log").write_text("\n".join(said))
    told = page(submission, [failed])
    assert told.splitlines()[2:-1] == ["    error: new", "      do b"]
    *words, option, name = shlex.split(told.splitlines()[-1])
    assert words[:-1] == ["lathe", "launch", "logs"]
    assert submissions.find(words[-1]).folder == submission.folder
    assert (option, name) == ("--stage", "export")
