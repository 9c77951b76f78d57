"""What was submitted, as a folder: `submission.yaml`, the resolved run files, scripts and logs."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from pipeline import __version__, runfile
from pipeline.console import duration
from pipeline.errors import ConfigError, LatheError, StorageError
from pipeline.operate.launch.stages import Pipeline, Stage
from pipeline.storage.whole_file import write_whole

FOLDER = Path("lathe-launches")
"""Where submissions are kept, if not told otherwise: one folder each."""
RECORD = "submission.yaml"
Place = Literal["slurm", "k8s", "local"]
NAMES: dict[Place, str] = {"slurm": "SLURM", "k8s": "Kubernetes", "local": "this machine"}


class StageRecord(BaseModel):
    """One stage of a submission.

    Args:
        name: of the stage.
        command: of lathe.
        run_file: its file in the folder.
        nodes: machines.
        tasks: workers.
        commands: argument lists of what was started.
        id: SLURM's job id, or the name of the Kubernetes Job; empty = not submitted yet.
        started: UTC, when it was submitted, or started here.
        ended: UTC, of those that are started one after the other.
        exit_code: of these.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    command: str
    run_file: str
    nodes: int = 1
    tasks: int = 1
    commands: list[list[str]] = []
    id: str = ""
    started: AwareDatetime | None = None
    ended: AwareDatetime | None = None
    exit_code: int | None = None


class Record(BaseModel):
    """The file `submission.yaml`.

    Args:
        version: of Lathe.
        name: of the submission, which its jobs bear; its folder may have got another since.
        place: where it runs.
        created: UTC.
        directory: that relative paths in run files begin at.
        process: of `lathe launch` itself, while it submits or starts stages: id, and when it was started.
        machine: of that process.
        namespace: of Kubernetes.
        context: of kubectl.
        stages: in order.
    """

    model_config = ConfigDict(extra="forbid")
    version: str
    name: str
    place: Place
    created: AwareDatetime
    directory: str
    process: tuple[Annotated[int, Field(gt=0, lt=2**31)], float] | None = None
    machine: str = ""
    namespace: str = ""
    context: str = ""
    stages: Annotated[list[StageRecord], Field(min_length=1)]


@dataclass
class Submission:
    """A folder and its record; `save` after each change."""

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        """By which commands find it: its folder's."""
        return self.folder.name

    @property
    def shown(self) -> str:
        """What a shell is given to find it again: its name, where it is in the usual place, else its folder."""
        return shlex.quote(self.name if self.folder.parent == FOLDER.absolute() else str(self.folder))

    def save(self) -> None:
        """Write the record whole. Raises StorageError."""
        text = yaml.safe_dump(
            self.record.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110, allow_unicode=True
        )
        try:
            write_whole(self.folder / RECORD, lambda file: file.write(text.encode()))
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def stage(self, name: str) -> StageRecord:
        """One stage. Raises ConfigError: there is none of that name."""
        for stage in self.record.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.record.stages)
        raise ConfigError(f"{self.name} has no stage {name}", f"its stages are {names}")

    def run_file(self, stage: StageRecord | Stage) -> Path:
        """The resolved run file of a stage."""
        return self.folder / f"{stage.name}.yaml"

    def log(self, stage: StageRecord | Stage, task: int | str | None = None) -> Path:
        """The file that a stage's output goes to, or one of its tasks'."""
        return self.folder / (f"{stage.name}.log" if task is None else f"{stage.name}.{task}.log")

    def logs(self, stage: StageRecord) -> dict[str, Path]:
        """The logs of a stage that are there, by task; "" where it has but one."""
        if stage.tasks == 1:
            return {"": self.log(stage)} if self.log(stage).exists() else {}
        found = {str(task): self.log(stage, task) for task in range(stage.tasks)}
        return {task: path for task, path in found.items() if path.exists()}


def plan(pipeline: Pipeline, place: Place, parent: Path | None, directory: Path) -> Submission:
    """A submission that is not written yet, under a name that is free.

    Args:
        pipeline: its stages.
        place: where it is to run.
        parent: folder of submissions; None = `lathe-launches` here.
        directory: that relative paths begin at.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    name = f"{pipeline.name}-{now.astimezone():%m%d-%H%M%S}"
    parent = (parent or FOLDER).absolute()
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folder = next(parent / one for one in names if not os.path.lexists(parent / one))
    stages = [
        StageRecord(
            name=stage.name,
            command=stage.command,
            run_file=f"{stage.name}.yaml",
            nodes=stage.nodes,
            tasks=stage.tasks,
        )
        for stage in pipeline.stages
    ]
    record = Record(
        version=__version__, name=folder.name, place=place, created=now, directory=str(directory), stages=stages
    )
    return Submission(folder, record)


def claim(submission: Submission) -> bool:
    """Make the folder, unless another launch has come before. Raises StorageError."""
    try:
        submission.folder.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and os.path.lexists(submission.folder):
            return False
        raise _unwritable(submission.folder, error) from error
    return True


def write(submission: Submission, pipeline: Pipeline, files: Sequence[tuple[str, str]] = ()) -> None:
    """Make the folder: resolved run files, and others by name.

    Raises:
        StorageError: it cannot be written.
        ConfigError: a run file does not read back as it was, so that the job would have other values.
    """
    try:
        _fill(submission, pipeline, files)
    except StorageError:
        shutil.rmtree(submission.folder, ignore_errors=True)  # nothing has begun
        raise


def _fill(submission: Submission, pipeline: Pipeline, files: Sequence[tuple[str, str]]) -> None:
    try:
        submission.folder.mkdir(parents=True, exist_ok=True)
        for name, text in files:
            (submission.folder / name).write_text(text, encoding="utf-8")
            (submission.folder / name).chmod(0o755 if text.startswith("#!") else 0o644)
        for stage in pipeline.stages:
            path = submission.run_file(stage)
            path.write_text(runfile.dump(stage.config), encoding="utf-8")
            if runfile.load_any(str(path)) != stage.config:
                raise ConfigError(
                    f"stage {stage.name}: its run file holds a value that YAML does not keep", f"see {path}"
                )
    except OSError as error:
        raise _unwritable(submission.folder, error) from error
    submission.save()


def find(address: str | None) -> Submission:
    """A submission by its folder, or its name below `lathe-launches`; None = the newest there.

    Raises:
        ConfigError: there is none; those that are there are named.
        StorageError: its record cannot be read.
    """
    if address is None:
        folders = known()
        newest = load(folders[-1]) if folders else None
        for path in FOLDER.glob(f"*/{RECORD}"):
            if path.parent not in folders and (not newest or path.stat().st_mtime > newest.record.created.timestamp()):
                load(path.parent)  # raises: it may be the newest, and another must not be taken for it
        if newest is None:
            raise ConfigError(
                f"nothing was launched from here: there is no {FOLDER}/", "give the folder of a submission, or go there"
            )
        return newest
    for folder in (Path(address), FOLDER / address):
        if os.path.isfile(folder / RECORD):  # noqa: PTH113  whatever is given, and of whomever
            return load(folder)
    if Path(address).name == RECORD and os.path.isfile(address):  # noqa: PTH113
        return load(Path(address).parent)
    names = [folder.name for folder in known()[-3:]]
    raise ConfigError(
        f"{address}: no such submission",
        f"give its folder, or one of those below {FOLDER}/: {', '.join(names)}" if names else "give its folder",
    )


def known(parent: Path | None = None) -> list[Path]:
    """The submissions below a folder, by default `lathe-launches` here; the newest last."""
    found = []
    for path in (parent or FOLDER).glob(f"*/{RECORD}"):
        with suppress(LatheError):  # of another version
            found.append((load(path.parent).record.created, path.parent))
    return [folder for _, folder in sorted(found)]


def load(folder: Path) -> Submission:
    """Read a submission's record. Raises StorageError, or ConfigError where it is of another version."""
    path = folder / RECORD
    try:
        record = Record.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", "mend its permissions") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of pydantic, bytes, YAML's dates
        raise ConfigError(
            f"{path} is no record that this version of Lathe reads", "look at it; job ids are in it"
        ) from error
    return Submission(folder.absolute(), record)


def age(moment: datetime) -> str:
    """How long ago something was."""
    return f"{duration(max(0.0, (datetime.now(UTC) - moment).total_seconds()))} ago"


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{folder} cannot be written: {error.strerror or error}", "make room there, or choose another with --folder"
    )
