"""`lathe launch cancel`."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress

from pipeline.errors import SetupError
from pipeline.operate.launch import k8s, slurm
from pipeline.operate.launch.sequence import is_under_way
from pipeline.operate.launch.states import OVER, states
from pipeline.operate.launch.submissions import Submission


def cancel(submission: Submission, stage: str | None) -> list[str]:
    """End what runs or waits, from the last stage on, so that none begins meanwhile.

    Args:
        submission: which.
        stage: from this one on; None = all.

    Returns:
        the stages that were ended.

    Raises:
        ConfigError: no such stage.
        SetupError: it is started by a process of another machine.
        LatheError: the scheduler does not answer.
    """
    first = submission.record.stages.index(submission.stage(stage)) if stage else 0
    left = [one.record for one in states(submission)[first:] if one.state not in OVER]
    if submission.record.place == "local" and not is_under_way(submission):
        return []
    if submission.record.place == "slurm":
        for record in reversed(left):
            slurm.cancel(submission, record.name, record.id)
        return [record.name for record in left]
    # This first: it would make the next stage, or take a deleted Job for one that has failed.
    if is_under_way(submission) and (left or not stage):
        _end_process(submission)
    if submission.record.place == "k8s":
        for record in left:
            if record.id:
                with suppress(k8s.GoneError):
                    k8s.ask(submission, "delete", record.id, "--wait=false")
    return [record.name for record in left]


def _end_process(submission: Submission) -> None:
    if submission.record.machine != socket.gethostname():
        raise SetupError(
            f"{submission.name} is started by a process on {submission.record.machine}", "run the same command there"
        )
    if submission.record.process is not None:
        with suppress(ProcessLookupError):
            os.kill(submission.record.process[0], signal.SIGTERM)
