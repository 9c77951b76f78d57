"""Stages one after the other, told as they go; a second call goes on with what is not finished."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

from pipeline import runfile
from pipeline.console import duration, tell
from pipeline.errors import LatheError, SetupError, StorageError
from pipeline.operate.launch.stages import Pipeline, Stage
from pipeline.operate.launch.submissions import Place, StageRecord, Submission, claim, known, load, plan, write


def begin(
    pipeline: Pipeline,
    place: Place,
    parent: Path | None,
    directory: Path,
    refresh: Callable[[Submission], None] = lambda submission: None,
) -> Submission:
    """The newest submission of just these stages that is not finished, or a new one.

    Args:
        pipeline: the stages.
        place: where they run.
        parent: folder of submissions; None = `lathe-launches` here.
        directory: that relative paths begin at.
        refresh: notes which stages have finished since.

    Raises:
        SetupError: it is under way.
        StorageError: the folder cannot be written.
    """
    for folder in reversed(known(parent)):
        submission = load(folder)
        if submission.record.place == place and _is_of(submission, pipeline, directory):
            if is_under_way(submission):
                raise SetupError(
                    f"{submission.name} is under way already, on {submission.record.machine}",
                    f"lathe launch logs {submission.shown} --follow, or lathe launch cancel {submission.shown}",
                )
            refresh(submission)
            if all(stage.exit_code == 0 for stage in submission.record.stages):
                break
            tell(f"goes on with {submission.name}")
            return submission
    while not claim(submission := plan(pipeline, place, parent, directory)):
        pass  # another launch of this second has the name
    write(submission, pipeline)
    return submission


def run_in_order(submission: Submission, pipeline: Pipeline, run: Callable[[Stage], bool]) -> None:
    """Have each stage run that is not finished.

    Args:
        submission: noted as it goes.
        pipeline: its stages.
        run: one stage; returns whether it was waited for. What it raises ends the sequence, and is raised here.
    """
    note_process(submission)
    for number, stage in enumerate(pipeline.stages, start=1):
        record = submission.stage(stage.name)
        title = f"[{number}/{len(pipeline.stages)}] {stage.name}: lathe {stage.command}"
        if record.exit_code == 0:
            tell(f"{title}  (finished earlier)")
            continue
        tell(title)
        record.started, record.ended, record.exit_code = _now(), None, None
        submission.save()
        try:
            record.exit_code = 0 if run(stage) else None
        except LatheError as error:
            record.exit_code = error.exit_code
            try:
                _end(submission, record)
            except StorageError as full:  # which may be what the stage has failed for, and its log cannot say
                error.message += f"; {full.message}"
            raise
        except BaseException:
            _end(submission, record)
            raise
        _end(submission, record)
        if record.exit_code == 0 and record.ended is not None:
            tell(f"  finished after {duration((record.ended - record.started).total_seconds())}")


def _end(submission: Submission, record: StageRecord) -> None:
    record.ended = _now()
    submission.save()


def note_process(submission: Submission) -> None:
    """That this process starts its stages; saved with the next change."""
    submission.record.process = (os.getpid(), psutil.Process().create_time())
    submission.record.machine = socket.gethostname()


def is_under_way(submission: Submission) -> bool:
    """Whether the process that starts its stages lives; of one on another machine, as the record has it."""
    if submission.record.process is None:
        return False
    if submission.record.machine != socket.gethostname():
        return any(stage.started and not stage.ended for stage in submission.record.stages)
    pid, born = submission.record.process
    try:
        process = psutil.Process(pid)
        is_it = abs(process.create_time() - born) < 1 and pid != os.getpid()
        return is_it and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_of(submission: Submission, pipeline: Pipeline, directory: Path) -> bool:
    there = [(stage.name, stage.tasks) for stage in submission.record.stages]
    if submission.record.directory != str(directory) or there != [(one.name, one.tasks) for one in pipeline.stages]:
        return False
    try:
        return all(
            submission.run_file(stage).read_text(encoding="utf-8") == runfile.dump(stage.config)
            for stage in pipeline.stages
        )
    except (OSError, UnicodeDecodeError, StorageError):
        return False


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
