"""`lathe launch local`: stages one after the other on this machine."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import picture_files
import psutil
import pytest

from pipeline import runfile
from pipeline.errors import ConfigError, LatheError, SetupError, StorageError
from pipeline.operate.launch import local, sequence, submissions
from pipeline.operate.launch.cancelling import cancel
from pipeline.operate.launch.stages import Pipeline, read_pipeline
from pipeline.operate.launch.states import is_well, states

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stand_ins(place, monkeypatch) -> dict[str, str]:
    """Python code by stage, which runs instead of the stages' own commands."""
    code = {name: f"print('hello from {name}')" for name in ("encode", "learn", "export")}
    monkeypatch.setattr(
        local,
        "_commands",
        lambda submission, stage: [[sys.executable, "-c", code[stage.name]] for _ in range(stage.tasks)],
    )
    return code


def here(tasks: int = 2) -> Pipeline:
    return read_pipeline(["pipe line.yaml"]).on_one_machine(tasks)


@pytest.mark.alone
def test_stages_on_this_machine_go_on_where_one_has_failed(stand_ins, place, capsys):
    stand_ins["learn"] = "print('out of luck'); raise SystemExit(4)"
    with pytest.raises(LatheError, match=r"stage learn ended with exit code 4; its output is in .*learn.log") as caught:
        local.launch(here(), None, place)
    assert caught.value.exit_code == 4
    said = capsys.readouterr()
    assert said.out.splitlines() == ["[0] hello from encode", "[1] hello from encode", "out of luck"]
    assert said.err.splitlines()[-1] == "[2/3] learn: lathe train"
    failed = submissions.find(None)
    assert [one.state for one in states(failed)] == ["finished", "failed", "waiting"]
    assert "exit code 4 after" in states(failed)[1].said

    stand_ins["learn"] = "print('luck')"
    done = local.launch(here(), None, place)
    assert done.folder == failed.folder
    said = capsys.readouterr()
    assert said.out.splitlines() == ["luck", "hello from export"]
    assert "[1/3] encode: lathe encode  (finished earlier)\n" in said.err
    assert is_well(states(done))
    assert local.launch(here(), None, place).folder != failed.folder  # all is finished: begun anew


@pytest.mark.alone
def test_a_stage_that_fails_since_the_disk_is_full(stand_ins, place, monkeypatch):
    """Its log cannot say so."""
    saved = submissions.Submission.save

    def save(submission: submissions.Submission) -> None:
        if submission.record.stages[0].ended:
            raise StorageError("there is no space left")
        saved(submission)

    monkeypatch.setattr(submissions.Submission, "save", save)
    stand_ins["encode"] = "raise SystemExit(1)"
    with pytest.raises(LatheError, match=r"stage encode ended with exit code 1; .*; there is no space left"):
        local.launch(here(), None, place)
    assert states(submissions.find(None))[0].state == "stopped"


@pytest.mark.alone
def test_other_settings_are_another_submission(stand_ins, place):
    stand_ins["export"] = "raise SystemExit(1)"
    folders = set()
    for arguments in (["pipe line.yaml"], ["pipe line.yaml", "learn.seed=9"], ["pipe line.yaml"]):
        with pytest.raises(LatheError):
            local.launch(read_pipeline(arguments).on_one_machine(1), None, place)
        folders.add(submissions.find(None).folder)
    assert len(folders) == 2


@pytest.mark.alone
def test_one_that_is_under_way_is_not_begun_twice_and_can_be_cancelled(stand_ins, place):
    stand_ins["export"] = "raise SystemExit(1)"
    with pytest.raises(LatheError):
        local.launch(here(), None, place)
    submission = submissions.find(None)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        submission.record.process = (child.pid, psutil.Process(child.pid).create_time())
        submission.stage("export").exit_code = submission.stage("export").ended = None
        submission.save()
        assert [one.state for one in states(submission)] == ["finished", "finished", "running"]
        with pytest.raises(SetupError, match="is under way already"):
            local.launch(here(), None, place)
        submission.stage("learn").exit_code = submission.stage("learn").ended = None
        submission.stage("export").started = None
        with pytest.raises(ConfigError, match="stage learn is under way, and on this machine one process runs all"):
            cancel(submission, "export")
        assert child.poll() is None
        submission = submissions.find(None)
        assert cancel(submission, None) == ["export"]
        assert child.wait(10) == -15
    finally:
        child.kill()
        child.wait()
    assert states(submission)[2].state == "stopped"
    assert cancel(submission, None) == []
    submission.record.process = (os.getpid(), 1.0)  # an id that another process has got since
    assert not sequence.is_under_way(submission)
    submission.record.machine = "elsewhere"
    with pytest.raises(SetupError, match="is started by a process on elsewhere"):
        cancel(submission, None)


@pytest.mark.alone
def test_the_command_line_ends_with_the_code_of_the_stage_that_failed(tmp_path):
    """Real commands: pack, and an export of a run that is not there."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture_files.file(picture_files.quarters()))
    (tmp_path / "photos" / "a.txt").write_text("four quarters")
    (tmp_path / "pack.yaml").write_text("job: pack\nsource: photos\noutput: images; $(touch owned)\n")
    (tmp_path / "export.yaml").write_text("job: export\nrun: run\nautoencoder: vae\noutput: export\n")

    def lathe(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", "launch", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = lathe("local", "pack.yaml", "export.yaml")
    assert done.returncode in (3, 4), done.stderr
    assert f"error: stage export ended with exit code {done.returncode}; its output is in " in done.stderr
    assert "1 pictures in 1 shards" in done.stdout
    assert "error: " in done.stdout  # the stage's own
    assert (tmp_path / "images; $(touch owned)" / "00000.tar").exists()
    status = lathe("status")
    assert status.returncode == 1
    assert re.search(r"\n  pack +finished +took .*\n  export +failed +exit code", status.stdout)
    assert "\n    error: " in status.stdout
    assert "(finished earlier)" in lathe("local", "pack.yaml", "export.yaml").stderr
    assert lathe("logs", "nix").stderr.startswith("error: nix: no such submission\n")


INTERRUPTED = """
import sys
from pathlib import Path
from pipeline.operate.launch import local
from pipeline.operate.launch.stages import read_pipeline

code = "import time; print('under way', flush=True); time.sleep(100)"
local._commands = lambda submission, stage: [[sys.executable, "-c", code]]
local.launch(read_pipeline(["export.yaml"]), None, Path.cwd())
"""


@pytest.mark.alone
def test_a_launch_that_is_asked_to_end_ends_its_stage(place):
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "under way\n"
    (stage,) = psutil.Process(child.pid).children()
    submission = submissions.find(None)
    assert states(submission)[0].state == "running"
    assert cancel(submission, None) == ["export"]
    child.wait(60)
    stage.wait(10)
    assert [one.state for one in states(submissions.find(None))] == ["stopped"]


WATCHED = """
import sys
from pathlib import Path
from pipeline.operate.launch import local
from pipeline.operate.launch.stages import read_pipeline

code = "import time\\nfor n in range(20): print(n, flush=True); time.sleep(0.1)"
local._commands = lambda submission, stage: [[sys.executable, "-c", code]]
local.launch(read_pipeline(["export.yaml"]), None, Path.cwd())
"""


@pytest.mark.alone
def test_a_stage_goes_on_where_whoever_watched_has_left(place):
    child = subprocess.Popen(
        [sys.executable, "-c", WATCHED], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "0\n"
    child.stdout.close()
    assert child.wait(60) == 0
    submission = submissions.find(None)
    assert [one.state for one in states(submission)] == ["finished"]
    assert submission.log(submission.record.stages[0]).read_text().endswith("\n19\n")


def test_the_commands_of_stages_on_this_machine(place):
    printed = [shlex.split(line) for line in local.dry_run(here(), None, place).splitlines()]
    assert [Path(command[-1]).name for command in printed] == [
        "encode.yaml",
        "encode.yaml",
        "learn.yaml",
        "export.yaml",
    ]
    assert printed[1][:-1] == [sys.executable, "-m", "pipeline", "encode", "--task", "1/2"]
    assert printed[2][:-1] == ["bash", str(runfile.bundled("launchers/local.sh"))]
    assert not (place / "lathe-launches").exists()
    (alone,) = local.dry_run(read_pipeline(["encode.yaml"]).on_one_machine(None), None, place).splitlines()
    assert " encode --task 0/1 " in alone  # the environment may be that of a task of an array
