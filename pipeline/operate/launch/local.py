"""`lathe launch local`: a pipeline on this machine, every stage by its own command."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import runfile
from pipeline.console import forget_output
from pipeline.errors import SetupError
from pipeline.operate.launch.logs import Follower
from pipeline.operate.launch.sequence import begin, run_in_order
from pipeline.operate.launch.stages import Pipeline, Stage
from pipeline.operate.launch.submissions import Submission, plan
from pipeline.operate.processes import run_together
from pipeline.stopping import not_ignored

_SAVING_SECONDS = 600.0


def launch(pipeline: Pipeline, parent: Path | None, directory: Path) -> Submission:
    """Run the stages one after the other; the first that fails ends it. Output goes to logs, and is shown.

    Raises:
        LatheError: a stage failed, with its exit code; the same command goes on from there.
        SetupError: another process is at it.
    """
    submission = begin(pipeline, "local", parent, directory)
    for number in not_ignored((signal.SIGTERM, signal.SIGHUP)):
        signal.signal(number, signal.default_int_handler)
    run_in_order(submission, pipeline, lambda stage: _run(submission, stage))
    return submission


def dry_run(pipeline: Pipeline, parent: Path | None, directory: Path) -> str:
    """The commands, as a shell would be given them."""
    submission = plan(pipeline, "local", parent, directory)
    return "\n".join(shlex.join(command) for stage in pipeline.stages for command in _commands(submission, stage))


def _run(submission: Submission, stage: Stage) -> bool:
    record = submission.stage(stage.name)
    commands = _commands(submission, stage)
    record.commands = [list(command) for command in commands]
    submission.save()
    tasks = range(stage.tasks) if stage.tasks > 1 else [None]
    logs: dict[Path | None, Sequence[str]] = {
        submission.log(stage, task): command for task, command in zip(tasks, commands, strict=True)
    }
    shown = Follower(lambda: submission.logs(record), from_end=True)

    def show(*, last: bool = False) -> None:
        try:
            shown.show(last=last)
        except (BrokenPipeError, SetupError):  # whoever watched has left: no reason to end it, the logs have it all
            forget_output()

    try:
        run_together(logs, {**os.environ, "PYTHON": sys.executable}, stage.name, show, _SAVING_SECONDS)
    finally:
        show(last=True)
    return True


def _commands(submission: Submission, stage: Stage) -> list[Sequence[str]]:
    run_file = str(submission.run_file(stage))
    if stage.command == "train":
        return [["bash", str(runfile.bundled("launchers/local.sh")), run_file]]
    lathe = [sys.executable, "-m", "pipeline", stage.command]
    if stage.command == "encode":  # said to one worker too: the environment may be that of a task of an array
        return [[*lathe, "--task", f"{task}/{stage.tasks}", run_file] for task in range(stage.tasks)]
    return [[*lathe, run_file]]
