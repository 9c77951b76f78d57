"""How far the stages of a submission are: told by SLURM, Kubernetes, or the processes of this machine."""

from __future__ import annotations

import itertools
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.console import duration
from pipeline.errors import LatheError
from pipeline.operate.launch import k8s, scripts, slurm
from pipeline.operate.launch.kubernetes import KEPT_SECONDS
from pipeline.operate.launch.logs import ending
from pipeline.operate.launch.sequence import is_under_way
from pipeline.operate.launch.stages import FINALIZE
from pipeline.operate.launch.submissions import NAMES, StageRecord, Submission, age

State = Literal["waiting", "running", "finished", "failed", "cancelled", "stopped", "forgotten"]
OVER: tuple[State, ...] = ("finished", "failed", "cancelled", "stopped", "forgotten")
_BAD: tuple[State, ...] = ("failed", "cancelled", "stopped")
_WHICH_COUNTS: tuple[State, ...] = ("running", "waiting", "failed", "cancelled", "forgotten", "finished")  # of tasks
_OF_SLURM: dict[str, State] = {
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "RUNNING": "running",
    "COMPLETING": "running",
    "CONFIGURING": "running",
    "STAGE_OUT": "running",
    **dict.fromkeys(("SUSPENDED", "SIGNALING", "STOPPED", "RESIZING"), "running"),
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"), "waiting"),
}
_MOST_LINES, _LOOKED_THROUGH = 6, 20
_FIELD = re.compile(r"(\w[\w/:]*)=(\S*)")
_TASKS = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


@dataclass(frozen=True)
class StageState:
    """One stage now.

    Args:
        record: of the stage.
        state: of all its tasks together; running as long as one does, then failed if one has.
        said: more of it: tasks, nodes, reasons.
    """

    record: StageRecord
    state: State
    said: str = ""


def states(submission: Submission) -> list[StageState]:
    """Every stage as it is now.

    Raises:
        SetupError: the scheduler's programs are not here.
        LatheError: the scheduler does not answer.
    """
    return _asked(submission, submission.record.stages)


def state(submission: Submission, stage: StageRecord) -> StageState:
    """One stage as it is now; of others nobody is asked. Raises as `states`."""
    names = (stage.name, f"{stage.name}{FINALIZE}")
    return _asked(submission, [one for one in submission.record.stages if one.name in names])[0]


def _asked(submission: Submission, stages: Sequence[StageRecord]) -> list[StageState]:
    of_place = {"slurm": _of_slurm, "k8s": _of_kubernetes, "local": _of_local}[submission.record.place]
    found = [of_place(submission, stage) for stage in stages]
    for place, (array, finalizer) in enumerate(itertools.pairwise(found)):
        is_its_own = finalizer.record.name == f"{array.record.name}{FINALIZE}"
        if is_its_own and array.state in ("failed", "cancelled") and finalizer.state == "finished":
            found[place] = replace(array, state="finished", said=f"{array.said}; {finalizer.record.name} did the rest")
    return found


def is_well(found: Sequence[StageState]) -> bool:
    """Whether no stage has failed or was stopped."""
    return not any(one.state in _BAD for one in found)


def page(submission: Submission, found: Sequence[StageState]) -> str:
    """The states for a person."""
    record = submission.record
    lines = [f"{submission.name} on {NAMES[record.place]}, launched {age(record.created)}, in {submission.folder}"]
    widths = (max(len(one.record.name) for one in found), max(len(one.record.id) for one in found))
    for one in found:
        cells = f"  {one.record.name:<{widths[0]}}  {one.record.id:<{widths[1]}}"
        lines.append(f"{cells.rstrip():<{widths[0] + widths[1] + 4}}  {one.state:<9}  {one.said}".rstrip())
        if one.state in ("failed", "stopped"):
            logs = submission.logs(one.record)
            endings = dict.fromkeys(tuple(_last_words(log)) for log in logs.values())
            lines += [f"    {said}" for said in itertools.chain(*endings)][:_MOST_LINES]
            if record.place == "slurm" and not logs:
                lines.append(f"    it has no log: can its nodes write to {submission.folder}?")
            else:
                lines.append(f"    lathe launch logs {submission.shown} --stage {one.record.name}")
    return "\n".join(lines)


def _last_words(log: Path) -> list[str]:
    """The last error and its remedy, else two lines: srun has the last word where a task of it has failed."""
    lines = ending(log, _LOOKED_THROUGH)
    errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    return lines[errors[-1] :][:2] if errors else lines[-2:]


def _of_local(submission: Submission, stage: StageRecord) -> StageState:
    if stage.exit_code is not None:
        took = duration((stage.ended - stage.started).total_seconds()) if stage.started and stage.ended else ""
        if stage.exit_code == 0:
            return StageState(stage, "finished", f"took {took}")
        return StageState(stage, "failed", f"exit code {stage.exit_code} after {took}")
    if stage.started is None:
        return StageState(stage, "waiting")
    if stage.ended is None and is_under_way(submission):
        elsewhere = submission.record.machine != socket.gethostname()
        where = f"on {submission.record.machine}, " if elsewhere else ""
        return StageState(stage, "running", f"{where}started {age(stage.started)}")
    return StageState(stage, "stopped", "the same launch goes on from here")


def _of_kubernetes(submission: Submission, stage: StageRecord) -> StageState:
    if not stage.id:
        watched = "" if is_under_way(submission) else "nobody makes it: start the same launch again"
        return StageState(stage, "waiting", watched)
    try:
        found, said = k8s.state_of(submission, stage.id)
    except k8s.GoneError:
        if stage.exit_code == 0:
            return StageState(stage, "finished", "its Job is deleted since")
        if stage.started and (datetime.now(UTC) - stage.started).total_seconds() > KEPT_SECONDS:
            return StageState(stage, "forgotten", "there is no Job of it any more: deleted, or ended a week ago")
        return StageState(stage, "cancelled", "there is no Job of it: deleted, or never made")
    return StageState(stage, found, said)  # type: ignore[arg-type]  # it is one of these


def _of_slurm(submission: Submission, stage: StageRecord) -> StageState:
    stage.id = stage.id or slurm.find(submission, stage.name)  # a launch that was killed may not have noted it
    if not stage.id:
        if submission.record.machine == socket.gethostname() and is_under_way(submission):
            return StageState(stage, "waiting", "its launch has not submitted it yet")
        return StageState(stage, "cancelled", "it was never submitted")
    try:
        said = slurm.ask("scontrol", "--oneliner", "show", "job", stage.id)
    except slurm.SlurmError as error:
        if "Invalid job id" not in error.message:
            raise
        said = ""
    name = scripts.job_name(submission.record.name, stage.name)
    jobs = [dict(reversed(_FIELD.findall(line))) for line in said.splitlines()]  # the first of a name counts
    jobs = [job for job in jobs if job.get("JobName") == name]
    known = {task for job in jobs for task in _tasks_of(job)}
    if not jobs or (stage.tasks > 1 and len(known) < stage.tasks):
        jobs += _accounted_for(stage, name, known)
    if not jobs:
        return StageState(stage, "forgotten", _without_record(submission, stage))
    return _of_jobs(stage, jobs)


def _of_jobs(stage: StageRecord, jobs: Sequence[dict[str, str]]) -> StageState:
    """Of what scontrol tells: one job, or the tasks of an array, those still to begin in one line."""
    counts: Counter[State] = Counter()
    for job in jobs:
        counts[_state(job.get("JobState", ""))] += len(_tasks_of(job)) if stage.tasks > 1 else 1
    counts["forgotten"] = max(0, stage.tasks - counts.total())  # of an array, those that ended a while ago
    together = next(one for one in _WHICH_COUNTS if counts[one])
    restarts = sum(int(job.get("Restarts", 0)) for job in jobs)
    notes = [f"{counts[one]} of {stage.tasks} {one}" for one in reversed(_WHICH_COUNTS) if counts[one]]
    notes = notes if stage.tasks > 1 else []
    for job in jobs:
        if _state(job.get("JobState", "")) == together:
            notes += _notes(job, together)
            break
    notes += [f"{restarts} restarts" if restarts > 1 else "1 restart"] if restarts else []
    return StageState(stage, together, ", ".join(notes))


def _tasks_of(job: Mapping[str, str]) -> set[int]:
    """Tasks of an array that one line is about: `5`, or of those to come `3,5-7%2`, `0-8:2`."""
    ends = _TASKS.findall(job.get("ArrayTaskId", "").partition("%")[0])
    return {task for first, last, step in ends for task in range(int(first), int(last or first) + 1, int(step or 1))}


def _notes(job: dict[str, str], found: State) -> list[str]:
    reason = job.get("Reason", "None")
    if found == "running":
        return [f"for {job.get('RunTime', '?')} on {job.get('NodeList', '?')}"]
    if found == "waiting":
        return [reason] if reason != "None" else []
    if found == "failed":
        code, _, number = job.get("ExitCode", "").partition(":")
        ended = f"signal {number}" if number not in ("", "0") else f"exit code {code}"
        said = [job.get("JobState", "").lower().replace("_", " "), ended, reason]
        return [one for one in said if one not in ("failed", "None", "NonZeroExitCode")]  # which say nothing more
    return [f"took {job['RunTime']}"] if found == "finished" and "RunTime" in job else []


def _accounted_for(stage: StageRecord, name: str, known: Set[int]) -> list[dict[str, str]]:
    """Jobs that SLURM keeps for minutes only, its accounting, where there is one, for good; without known tasks."""
    try:
        columns = "--format=JobID,JobName%64,State,Elapsed,ExitCode"
        said = slurm.ask("sacct", "-X", "--noheader", "--parsable2", columns, "--jobs", stage.id)
    except LatheError:
        return []
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 4]
    jobs = [
        {"JobState": of.split()[0], "RunTime": took, "ExitCode": code, "ArrayTaskId": identity.partition("_")[2]}
        for identity, who, of, took, code in rows
        if who == name and of
    ]
    return [job for job in jobs if not _tasks_of(job) & known]


def _without_record(submission: Submission, stage: StageRecord) -> str:
    logs = submission.logs(stage)
    last = ending(list(logs.values())[-1]) if logs else []
    said = f"its log ends with: {last[0].strip()}" if last else "it has written no log"
    return f"SLURM has no record of it any more; {said}"


def _state(word: str) -> State:
    return _OF_SLURM.get(word, "failed")
