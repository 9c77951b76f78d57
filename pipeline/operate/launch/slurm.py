"""`lathe launch slurm`: a pipeline as jobs that wait for each other."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.config import SiteConfig, TrainConfig
from pipeline.console import tell
from pipeline.errors import ConfigError, LatheError, SetupError
from pipeline.metrics import LogFollower
from pipeline.operate.launch import programs, scripts
from pipeline.operate.launch.sequence import note_process
from pipeline.operate.launch.stages import Pipeline, Stage
from pipeline.operate.launch.submissions import Submission, claim, plan, write
from pipeline.operate.runs.find import open_to_look
from pipeline.stopping import not_ignored
from pipeline.tether import signals_deferred

_HERE = "use a machine of the cluster; lathe launch slurm --dry-run shows anywhere what would run"
_OF_CLUSTERS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_NO_ANSWER = re.compile(r"[Uu]nable to contact|[Cc]onnection refused|[Cc]ommunication connection failure|timed out")
_OVERRULING = tuple(  # what scripts say; names, and arrays that are none, would not be known again
    f"SBATCH_{name}"
    for name in ("ARRAY_INX", "ERROR", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "REQUEUE", "SIGNAL", "WAIT")
)


class SlurmError(LatheError):
    """SLURM does not answer, or has refused a job."""

    exit_code = SetupError.exit_code


def found(program: str) -> str:
    """The path of a program of SLURM. Raises SetupError."""
    return programs.found(program, _HERE)


def ask(program: str, *arguments: str, stdin: str | None = None, folder: Path | None = None) -> str:
    """What a program of SLURM says, which succeeds.

    Raises:
        SetupError: it is not there.
        SlurmError: SLURM does not answer, or refuses.
    """
    path = found(program)
    code, out, err = programs.said_by(
        [path, *arguments], stdin=stdin, folder=str(folder) if folder else None, environment=_outside_of_jobs()
    )
    if code == 0:
        return out + (err if program == "sbatch" else "")
    if _NO_ANSWER.search(err):
        raise SlurmError(
            f"SLURM does not answer: {programs.complaint(err, code)}", "try again later; sinfo tells when it does"
        )
    raise SlurmError(f"{program}: {programs.complaint(err, code)}", "mend what it names")


def _outside_of_jobs() -> dict[str, str]:
    """The environment without what a job around this process was told of itself, which sbatch would hand on."""
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if (not (inside and name.startswith("SLURM_")) or name in _OF_CLUSTERS) and name not in _OVERRULING
    }


def prepared(
    pipeline: Pipeline, site: SiteConfig, parent: Path | None, directory: Path
) -> tuple[Submission, dict[str, str]]:
    """A submission that is not written yet, and its scripts by file name. Raises ConfigError."""
    submission = plan(pipeline, "slurm", parent, directory)
    files = {}
    container = site.container
    if container is not None and container.runtime == "apptainer":
        files[scripts.PYTHON] = scripts.python_in_container(site, container, submission.folder, directory)
    for stage in pipeline.stages:
        files[f"{stage.name}.sh"] = scripts.render(
            stage, site, name=submission.name, folder=submission.folder, directory=directory
        )
    return submission, files


def launch(pipeline: Pipeline, site: SiteConfig, parent: Path | None, directory: Path) -> Submission:
    """Submit every stage, each to begin once the one before has finished.

    Args:
        pipeline: the stages, finalizers among them.
        site: the cluster.
        parent: folder of submissions; None = `lathe-launches` here.
        directory: that relative paths begin at.

    Raises:
        SetupError: no sbatch here.
        SlurmError: SLURM does not answer or refuses a job; those submitted before are cancelled.
        StorageError: the folder cannot be written.
    """
    found("sbatch")
    submission, files = prepared(pipeline, site, parent, directory)
    while not claim(submission):  # another launch of this second has the name
        submission, files = prepared(pipeline, site, parent, directory)
    note_process(submission)
    write(submission, pipeline, list(files.items()))
    for number in not_ignored((signal.SIGTERM, signal.SIGHUP)):
        signal.signal(number, signal.default_int_handler)
    jobs: list[str] = []
    try:
        for stage in pipeline.stages:
            record = submission.stage(stage.name)
            options = _options(submission, stage, jobs)
            script = str(submission.folder / f"{stage.name}.sh")
            record.commands = [["sbatch", *options, script]]
            with signals_deferred():  # a job is submitted and noted, or neither
                jobs.append(_id(submission, stage.name, ask("sbatch", *options, script, folder=directory)))
                record.id, record.started = jobs[-1], submission.record.created
                submission.save()
    except BaseException as error:
        with signals_deferred():
            _take_back(submission, error)
        raise
    return submission


def dry_run(pipeline: Pipeline, site: SiteConfig, parent: Path | None, directory: Path) -> tuple[str, list[str]]:
    """Everything that `launch` would give to SLURM, as text; and what SLURM says of each script, where it is here.

    Raises:
        SlurmError: SLURM refuses a script.
    """
    submission, files = prepared(pipeline, site, parent, directory)
    parts = [f"==> {submission.folder / name} <==\n{text}" for name, text in files.items()]
    commands: list[str] = []
    jobs: list[str] = []
    for stage in pipeline.stages:
        script = str(submission.folder / f"{stage.name}.sh")
        commands.append(shlex.join(["sbatch", *_options(submission, stage, jobs), script]))
        jobs.append(f"JOB-OF-{stage.name}")
    parts.append("==> commands <==\n" + "\n".join(commands))
    return "\n".join(parts), _tested(pipeline, files, directory)


def signal_warnings(pipeline: Pipeline, site: SiteConfig) -> list[str]:
    """Where a run's checkpoints so far took longer than it is given to save before its time is over."""
    warnings = []
    for stage in pipeline.stages:
        if not isinstance(stage.config, TrainConfig):
            continue
        asked = scripts.settings(stage, site)
        try:
            log = LogFollower(open_to_look(stage.config.output))
            seconds = [line.get("checkpoint_seconds") for line in log.lines()]
        except LatheError:  # it has not begun, or its store is not reached from here
            continue
        longest = max((one for one in seconds if isinstance(one, int | float)), default=0.0)
        if longest >= asked.signal_seconds:
            warnings.append(
                f"stage {stage.name}: a checkpoint of {stage.config.output} has taken {longest:.0f} s, but the run is"
                f" asked to save only {asked.signal_seconds} s before its time is over\n"
                f"  set slurm.signal_seconds of the site to {2 * longest:.0f} or more"
            )
    return warnings


def _options(submission: Submission, stage: Stage, jobs: Sequence[str]) -> list[str]:
    """What of a job stands in no script: paths, which a script's lines could not hold whole, and dependencies.

    Args:
        submission: has the logs.
        stage: whose job it is.
        jobs: ids of those before it.
    """
    log = submission.log(stage, "%a" if stage.tasks > 1 else None).name
    options = ["--parsable", f"--output={_literal(submission.folder)}/{log}"]
    conditions = [f"afterok:{job}" for job in jobs[-1:]]
    if stage.finalizes:  # it does what tasks that failed have left, but not where there was nothing to encode with
        conditions = [f"afterany:{jobs[-1]}", *(f"afterok:{job}" for job in jobs[-2:-1])]
    if conditions:
        options += [f"--dependency={','.join(conditions)}", "--kill-on-invalid-dep=yes"]
    return options


def _literal(folder: Path) -> str:
    """A folder in a pattern of SLURM's, in which % begins a field. Raises ConfigError: there is none for it."""
    if "\\" in str(folder):
        raise ConfigError(
            f"{folder}: SLURM writes no log below a folder with a backslash", "choose another with --folder"
        )
    return str(folder).replace("%", "%%")


def _id(submission: Submission, stage: str, said: str) -> str:
    numbers = set(re.findall(r"^(\d+)(?:;\S*)?$", said, re.MULTILINE))  # a federation puts the cluster's name behind it
    known = numbers.pop() if len(numbers) == 1 else find(submission, stage)  # sites have sbatch say more
    if not known:
        raise SlurmError(f"sbatch has told no job id, but {said.strip()!r}", "look at squeue --me")
    return known


def _take_back(submission: Submission, error: BaseException) -> None:
    """Cancel what was submitted: half a pipeline is of no use."""
    jobs = [stage for stage in submission.record.stages if stage.id]
    failed = next((stage.name for stage in submission.record.stages if not stage.id), None)
    told = f"; the {len(jobs)} submitted before were cancelled" if jobs else ""
    for stage in jobs:
        try:
            cancel(submission, stage.name, stage.id)
        except LatheError:
            told = f"; cancel those submitted before: scancel {' '.join(job.id for job in jobs)}"
    if failed is not None:  # a submission whose answer was lost may have been one
        with suppress(LatheError):
            cancel(submission, failed, "")
    if isinstance(error, LatheError):
        error.message = (f"stage {failed} was not submitted: " if failed else "") + error.message + told
    elif jobs:
        tell(f"{submission.name}: stopped while it was submitted{told}")


def cancel(submission: Submission, stage: str, job: str) -> None:
    """End a job, if it is still the one that was submitted: ids begin anew where a cluster is set up anew.

    Args:
        submission: which.
        stage: its name.
        job: id; empty = it is not known.

    Raises:
        SlurmError: SLURM does not answer.
    """
    ask("scancel", f"--name={scripts.job_name(submission.record.name, stage)}", job or f"--user={os.getuid()}")


def find(submission: Submission, stage: str) -> str:
    """The id of a job that waits or runs, but was not noted, since the launch was killed; empty = there is none.

    Raises:
        SlurmError: SLURM does not answer.
    """
    name = f"--name={scripts.job_name(submission.record.name, stage)}"
    said = ask("squeue", "--noheader", name, f"--user={os.getuid()}", "--format=%F")
    return next(iter(said.split()), "")


def _tested(pipeline: Pipeline, files: dict[str, str], directory: Path) -> list[str]:
    """What `sbatch --test-only` says of each script; nothing where there is no SLURM."""
    try:
        found("sbatch")
    except SetupError:
        return ["there is no sbatch here: the scripts were not tried"]
    told = []
    for stage in pipeline.stages:
        try:
            said = ask("sbatch", "--test-only", stdin=files[f"{stage.name}.sh"], folder=directory)
        except SlurmError as error:
            error.message = f"stage {stage.name}: {error.message}"
            raise
        told.append(f"{stage.name}: {programs.complaint(said)}")
    return told
