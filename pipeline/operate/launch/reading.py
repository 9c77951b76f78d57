"""`lathe launch logs`: of files, or of Kubernetes' pods."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from pipeline.console import tell
from pipeline.errors import ConfigError, LatheError
from pipeline.operate.launch import k8s, slurm
from pipeline.operate.launch.logs import show
from pipeline.operate.launch.states import OVER, state
from pipeline.operate.launch.submissions import StageRecord, Submission, load

_MOST_PODS = 1024


def read(submission: Submission, name: str | None, task: int | None, lines: int, *, follow: bool) -> None:
    """Print the last lines of a stage's log, and if wanted those that come until it is over.

    Args:
        submission: which.
        name: of the stage; None = the last that has begun.
        task: of its tasks, on Kubernetes of its pods; None = all, with their numbers before the lines.
        lines: the last so many.
        follow: until the stage is over; it may have to begin first.

    Raises:
        ConfigError: no such stage or task, or it has no log yet and is not waited for.
        LatheError: the scheduler does not answer.
    """
    stage = submission.stage(name) if name else _last_begun(submission)
    count = max(stage.tasks, stage.nodes) if submission.record.place == "k8s" else stage.tasks
    if task is not None and task >= count:
        raise ConfigError(f"--task {task}: stage {stage.name} has {count}", "count from 0")
    if submission.record.place == "k8s":
        _read_pods(submission, stage, task, lines, follow)
        return

    def files() -> dict[str, Path]:
        found = submission.logs(stage)
        return {one: path for one, path in found.items() if task is None or one in ("", str(task))}

    if follow:
        _follow(submission, stage, files, lines)
        return
    if not files():
        raise ConfigError(
            f"stage {stage.name} of {submission.name} has no log yet: it is {state(submission, stage).state}",
            "--follow waits for it; lathe launch status tells more",
        )
    show(files, lines)


def _follow(submission: Submission, stage: StageRecord, files: Callable[[], dict[str, Path]], lines: int) -> None:
    if submission.record.place == "slurm":
        slurm.found("scontrol")  # without it nobody would ever tell that the stage is over
    told, complaint = "", ""

    def is_over() -> bool:
        nonlocal told, complaint
        try:
            fresh = load(submission.folder)  # with what its launch has noted since
            now = state(fresh, fresh.stage(stage.name))
        except LatheError as error:  # it may answer the next time
            if error.message != complaint:
                tell(complaint := error.message)
            return False
        told, complaint = ", ".join(filter(None, (now.state, now.said))), ""
        return now.state in OVER

    show(files, lines, is_over)
    tell(f"stage {stage.name}: {told}")


def _last_begun(submission: Submission) -> StageRecord:
    begun = [stage for stage in submission.record.stages if submission.logs(stage)]
    if submission.record.place == "k8s":
        begun = [stage for stage in submission.record.stages if stage.id]
    return begun[-1] if begun else submission.record.stages[0]


def _read_pods(submission: Submission, stage: StageRecord, task: int | None, lines: int, follow: bool) -> None:
    if not stage.id:
        raise ConfigError(f"stage {stage.name} of {submission.name} is not made yet", "wait for the stage before")
    wanted = f"app.kubernetes.io/instance={stage.id.partition('/')[2]}"
    if task is not None:
        wanted += f",{_label(stage, task)}"
    options = ["--selector", wanted, "--prefix", f"--tail={lines}", f"--max-log-requests={_MOST_PODS}"]
    command = k8s.kubectl(submission, "logs", *options, *(["--follow"] if follow else []))
    code = subprocess.run(command, check=False).returncode
    if code not in (0, -signal.SIGPIPE):  # whoever read may have left
        raise LatheError(
            f"kubectl logs ended with exit code {code}", "pods may be gone; lathe launch status tells more"
        )


def _label(stage: StageRecord, task: int) -> str:
    if not stage.id.startswith("pytorchjob"):
        return f"batch.kubernetes.io/job-completion-index={task}"
    kind = "training.kubeflow.org/replica-type"
    return f"{kind}=worker,training.kubeflow.org/replica-index={task - 1}" if task else f"{kind}=master"
