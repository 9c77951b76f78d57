"""`lathe launch slurm` up to SLURM: what it is given, and what is taken back."""

from __future__ import annotations

import os
import shlex
import time
from typing import Any

import pytest
from launch_files import site

from pipeline.errors import ConfigError, StorageError
from pipeline.operate.launch import slurm, submissions
from pipeline.operate.launch.stages import read_pipeline


def test_the_command_line_of_sbatch(place):
    pipeline = read_pipeline(["pipe line.yaml"]).with_finalizers()
    printed, _ = slurm.dry_run(pipeline, site(), place / "50%", place)
    commands = [shlex.split(line) for line in printed.partition("==> commands <==\n")[2].splitlines()]
    assert [command[3:-1] for command in commands] == [
        [],
        ["--dependency=afterany:JOB-OF-encode", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:JOB-OF-encode-finalize", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:JOB-OF-learn", "--kill-on-invalid-dep=yes"],
    ]
    assert commands[0][:2] == ["sbatch", "--parsable"]
    assert commands[0][2].startswith(f"--output={place}/50%%/pipe-line-")
    assert commands[0][2].endswith("/encode.%a.log")
    with pytest.raises(ConfigError, match="backslash"):
        slurm.dry_run(pipeline, site(), place / "a\\b", place)
    assert not (place / "50%").exists()


def test_a_checkpoint_that_takes_longer_than_the_signal_gives(place):
    (place / "r/run").mkdir(parents=True)
    lines = ['{"step": 1, "checkpoint_seconds": 400.2}', '{"step": 2}', '{"step": 3, "checkpoint_seconds": 200}']
    (place / "r/run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    pipeline = read_pipeline(["train.yaml", "export.yaml"])
    (warning,) = slurm.signal_warnings(pipeline, site())
    assert "a checkpoint of r/run has taken 400 s, but the run is asked to save only 300 s before" in warning
    assert not slurm.signal_warnings(pipeline, site(slurm={"signal_seconds": 401}))


def test_a_store_that_is_away_does_not_hold_up_a_launch(place, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("pipeline.operate.runs.find._GIVE_UP_SECONDS", "0")
    begun = time.monotonic()
    assert slurm.signal_warnings(read_pipeline(["train.yaml", "root=s3://bucket/run"]), site()) == []
    assert time.monotonic() - begun < 20


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, ...]]:
    """What SLURM was asked; it takes one job, and is interrupted at the second."""
    calls: list[tuple[str, ...]] = []

    def ask(program: str, *arguments: str, **_: Any) -> str:
        calls.append((program, *arguments))
        if program == "sbatch" and len(calls) > 1:
            raise KeyboardInterrupt
        return "71\n"

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.programs, "found", lambda program, _: program)
    return calls


def test_a_launch_that_is_interrupted_leaves_no_job(place, asked, capsys):
    pipeline = read_pipeline(["encode.yaml", "export.yaml"])
    with pytest.raises(KeyboardInterrupt):
        slurm.launch(pipeline, site(), None, place)
    name = submissions.find(None).name
    assert asked[-2] == ("scancel", f"--name={name}.encode", "71")
    assert asked[-1][:2] == ("scancel", f"--name={name}.export")
    assert capsys.readouterr().err == f"{name}: stopped while it was submitted; the 1 submitted before were cancelled\n"


def test_jobs_are_cancelled_where_the_record_cannot_be_written(place, monkeypatch):
    """At the last stage too, when none is left that could not be submitted."""
    asked: list[tuple[str, ...]] = []

    def ask(*arguments: str, **_: Any) -> str:
        asked.append(arguments)
        return f"{len(asked)}\n"

    saved = submissions.Submission.save

    def save(submission: submissions.Submission) -> None:
        if all(stage.id for stage in submission.record.stages):
            raise StorageError("the disk is full")
        saved(submission)

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm.programs, "found", lambda program, remedy: program)
    monkeypatch.setattr(submissions.Submission, "save", save)
    with pytest.raises(StorageError, match=r"^the disk is full; the 3 submitted before were cancelled$"):
        slurm.launch(read_pipeline(["pipe line.yaml"]), site(), None, place)
    assert [(arguments[0], arguments[-1]) for arguments in asked[3:]] == [("scancel", str(job)) for job in (1, 2, 3)]


def test_jobs_know_nothing_of_the_job_that_they_are_submitted_from(tmp_path, monkeypatch):
    """Another array's task id, or the CPUs that srun has bound a shell to, would be taken for their own."""
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\nexec env\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SLURM_CPU_BIND", "OTHERS"):
        monkeypatch.setenv(name, "x")

    def handed_on() -> set[str]:
        names = {line.partition("=")[0] for line in slurm.ask("sbatch").splitlines()}
        return {name for name in names if name.startswith(("SLURM_", "OTHERS"))}

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert handed_on() == {"SLURM_CONF", "SLURM_ARRAY_TASK_ID", "SLURM_CPU_BIND", "OTHERS"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert handed_on() == {"SLURM_CONF", "OTHERS"}


def test_variables_of_sbatch_overrule_no_script(monkeypatch):
    for name in ("JOB_NAME", "ARRAY_INX", "ERROR", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    assert {name for name in slurm._outside_of_jobs() if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


def test_a_site_has_sbatch_say_more(place, monkeypatch):
    """A line of digits beside the id: which it is, its name tells."""
    said = {"sbatch": "2026\n4711;cluster\n", "squeue": "4711\n"}
    monkeypatch.setattr(slurm, "ask", lambda program, *_, **__: said[program])
    monkeypatch.setattr(slurm.programs, "found", lambda program, remedy: program)
    submission = slurm.launch(read_pipeline(["export.yaml"]), site(), None, place)
    assert [stage.id for stage in submission.record.stages] == ["4711"]
