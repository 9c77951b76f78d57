"""`lathe launch cancel`."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress

from pipeline.errors import ConfigError, SetupError
from pipeline.operate.launch import k8s, slurm
from pipeline.operate.launch.sequence import is_under_way
from pipeline.operate.launch.states import OVER, states
from pipeline.operate.launch.submissions import StageRecord, Submission, load

_LEAVE_SECONDS = 20.0


def cancel(submission: Submission, stage: str | None) -> list[str]:
    """End what runs or waits, from the last stage on, so that none begins meanwhile.

    Args:
        submission: which.
        stage: from this one on; None = all.

    Returns:
        the stages that were ended.

    Raises:
        ConfigError: no such stage; or one that the process of an earlier one is to start.
        SetupError: it is started by a process of another machine.
        LatheError: the scheduler does not answer.
    """
    first = submission.record.stages.index(submission.stage(stage)) if stage else 0
    end = {"slurm": _on_slurm, "k8s": _on_kubernetes, "local": _here}[submission.record.place]
    return [record.name for record in end(submission, first)]


def _left(submission: Submission, first: int) -> list[StageRecord]:
    return [one.record for one in states(submission)[first:] if one.state not in OVER]


def _on_slurm(submission: Submission, first: int) -> list[StageRecord]:
    left = _left(submission, first)
    for record in reversed(left):
        slurm.cancel(submission, record.name, record.id)
    return left


def _on_kubernetes(submission: Submission, first: int) -> list[StageRecord]:
    # This first: it would make the next stage, or take a deleted Job for one that has failed.
    if is_under_way(submission):
        _end_process(submission)
        until = time.monotonic() + _LEAVE_SECONDS
        while is_under_way(submission) and time.monotonic() < until:
            time.sleep(0.1)
        submission = load(submission.folder)  # with what it made meanwhile
    left = _left(submission, first)
    for record in left:
        if record.id:
            k8s.delete(submission, record)
    return left


def _here(submission: Submission, first: int) -> list[StageRecord]:
    if not is_under_way(submission):
        return []
    for one in states(submission)[:first]:
        if one.state == "running":
            raise ConfigError(
                f"stage {one.record.name} is under way, and on this machine one process runs all stages",
                "leave out --stage to end it, then launch the stages that you want",
            )
    left = _left(submission, first)
    _end_process(submission)
    return left


def _end_process(submission: Submission) -> None:
    if submission.record.machine != socket.gethostname():
        raise SetupError(
            f"{submission.name} is started by a process on {submission.record.machine}",
            f"run the same command there; if that machine is gone, delete {submission.folder}",
        )
    if submission.record.process is not None:
        with suppress(ProcessLookupError):
            os.kill(submission.record.process[0], signal.SIGTERM)
