"""`lathe launch logs`: of files that are there, that grow, and that are followed."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import psutil
import pytest
from launch_files import JOB, written

from pipeline.errors import ConfigError, StorageError
from pipeline.operate.launch import logs, slurm
from pipeline.operate.launch.logs import Follower, ending, show
from pipeline.operate.launch.reading import read
from pipeline.operate.launch.scripts import job_name
from pipeline.operate.launch.submissions import load


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(logs, "_STATE_SECONDS", 0.1)


def test_logs_show_the_last_lines_then_what_comes_each_line_once(tmp_path, capsys):
    first, second = tmp_path / "encode-0.log", tmp_path / "encode-1.log"
    first.write_text("".join(f"line {i}\n" for i in range(50)))
    answers = iter([False, True])

    def is_over() -> bool:
        over = next(answers)
        if not over:
            with first.open("a") as file:
                file.write("more\nhalf")
            second.write_text("\x1b[31mred\n")
        return over

    show(lambda: {str(i): path for i, path in enumerate((first, second)) if path.exists()}, 2, is_over)
    assert capsys.readouterr().out.splitlines() == [
        "[0] line 48",
        "[0] line 49",
        "[0] more",
        "[1] \\x1b[31mred",
        "[0] half",
    ]
    assert ending(first) == ["half"]


@pytest.mark.parametrize("lines", [0, 1, 3, 99])
@pytest.mark.parametrize("text", ["", "a\n", "a\nb\nc\nd\n", "a\nb\nno end"])
def test_the_last_lines_of_a_log(tmp_path, capsys, lines, text):
    log = tmp_path / "x.log"
    log.write_text(text)
    show(lambda: {"": log}, lines)
    assert capsys.readouterr().out.splitlines() == text.splitlines()[max(0, len(text.splitlines()) - lines) :]


def test_a_log_that_was_begun_anew_is_shown_from_its_start(tmp_path, capsys):
    log = tmp_path / "x.log"
    log.write_text("one\ntwo\n")
    follower = Follower(lambda: {"": log})
    follower.show()
    log.write_text("new\n")
    follower.show()
    assert capsys.readouterr().out.splitlines() == ["one", "two", "new"]


def test_a_stage_without_a_log(submitted, monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: "")
    with pytest.raises(ConfigError, match=r"stage learn of .* has no log yet: it is forgotten"):
        read(submitted, "learn", None, 5, follow=False)
    with pytest.raises(ConfigError, match="has no stage lern"):
        read(submitted, "lern", None, 5, follow=False)
    with pytest.raises(ConfigError, match="--task 8: stage encode has 8"):
        read(submitted, "encode", 8, 5, follow=False)


def test_a_scheduler_that_is_away_for_a_moment_ends_no_watching(submitted, monkeypatch, capsys):
    """And of other stages than the one that is followed nobody is asked."""
    name = job_name(submitted.name, "learn")
    answers = iter(["RUNNING", None, None, "COMPLETED"])
    asked = set()

    def ask(program: str, *arguments: str, **_: Any) -> str:
        asked.add(arguments[-1])
        if (word := next(answers)) is None:
            raise slurm.SlurmError("SLURM does not answer: Unable to contact slurm controller")
        return JOB.format(6, name, word, "None", 0, "0:0")

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(slurm, "found", lambda program: program)
    submitted.log(submitted.record.stages[1]).write_text("step 5\n")
    read(submitted, "learn", None, 5, follow=True)
    said = capsys.readouterr()
    assert said.out == "step 5\n"
    told = "SLURM does not answer: Unable to contact slurm controller"
    assert said.err.splitlines() == [told, "stage learn: finished, took 00:01:02"]
    assert asked == {"6"}


def test_lines_come_while_the_scheduler_says_nothing(tmp_path, monkeypatch):
    log = tmp_path / "x.log"
    log.write_text("begun\n")
    shown: list[str] = []
    seen = threading.Event()

    def say(line: str) -> None:
        shown.append(line)
        if line == "more":
            seen.set()

    def is_over() -> bool:
        log.write_text("begun\nmore\n")
        assert seen.wait(20)
        return True

    monkeypatch.setattr(logs, "say", say)
    show(lambda: {"": log}, 9, is_over)
    assert shown == ["begun", "more"]
    assert seen.is_set()


def test_the_end_of_a_stage_is_what_its_launch_has_noted_since(place, capsys):
    submission = written("export.yaml")
    submission.record.place = "local"
    submission.record.process = (os.getppid(), psutil.Process(os.getppid()).create_time())
    submission.record.machine = socket.gethostname()
    (stage,) = submission.record.stages
    stage.started = submission.record.created
    submission.save()
    early = load(submission.folder)
    stage.exit_code, stage.ended = 0, stage.started
    noted = threading.Timer(0.2, submission.save)
    noted.start()
    read(early, None, None, 5, follow=True)
    noted.join()
    assert capsys.readouterr().err == "stage export: finished, took 0 s\n"


def test_a_log_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        show(lambda: {"": tmp_path}, 5)
