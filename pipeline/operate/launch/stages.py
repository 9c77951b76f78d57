"""From run files to the stages of one submission: resolved, and checked before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import runfile
from pipeline.config import EncodeConfig, LaunchConfig, RunConfig, SlurmConfig, StageConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.operate.launch.addresses import check_addresses

FINALIZE = "-finalize"
"""How the name ends of the stage behind an encode of several tasks."""
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
_FIELDS = tuple(LaunchConfig.model_fields)
_LONGEST_NAME = 14  # with stage and time, Kubernetes takes it


@dataclass(frozen=True)
class Stage:
    """One command of a submission.

    Args:
        name: of the stage, and of its files: small letters, digits and dashes.
        config: its resolved run file.
        nodes: machines; more than 1 of train alone.
        tasks: workers; more than 1 of encode alone.
        at_once: of the workers, at the same time.
        finalizes: a worker that takes what the stage before has left, and sees to the manifest.
        slurm: what it asks of SLURM instead of the site's.
    """

    name: str
    config: RunConfig
    nodes: int = 1
    tasks: int = 1
    at_once: int = 1
    finalizes: bool = False
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def command(self) -> str:
        """Of `lathe`, such as train."""
        return str(type(self.config).model_fields["job"].default)


@dataclass(frozen=True)
class Pipeline:
    """Stages, each of which begins once the one before has finished."""

    name: str
    stages: tuple[Stage, ...]

    def with_finalizers(self) -> Pipeline:
        """Behind every encode of several tasks, one worker that takes what was left, and folds the manifest."""
        stages: list[Stage] = []
        for stage in self.stages:
            stages.append(stage)
            if stage.tasks > 1:
                stages.append(replace(stage, name=f"{stage.name}{FINALIZE}", tasks=1, at_once=1, finalizes=True))
        return replace(self, stages=tuple(stages))

    def on_one_machine(self, tasks: int | None) -> Pipeline:
        """The stages without what a cluster is for: one node, and so many workers, by default one."""
        count = {True: tasks or 1, False: 1}
        sizes = [count[isinstance(stage.config, EncodeConfig)] for stage in self.stages]
        stages = (
            replace(stage, nodes=1, tasks=size, at_once=size) for stage, size in zip(self.stages, sizes, strict=True)
        )
        return replace(self, stages=tuple(stages))


def read_pipeline(
    arguments: Sequence[str], *, nodes: int | None = None, tasks: int | None = None, at_once: int | None = None
) -> Pipeline:
    """The stages that a command line names.

    Args:
        arguments: run files, in the order of the stages, or one pipeline (`job: launch`); and FIELD=VALUE overrides:
            STAGE.FIELD of one stage, others of every run file, or of the pipeline.
        nodes: machines of every train stage, in place of what the pipeline says.
        tasks: workers of every encode stage, likewise.
        at_once: of the workers, likewise.

    Raises:
        ConfigError: naming file and field; or stages that do not fit together.
    """
    files = [one for one in arguments if not _is_override(one)]
    overrides = [one for one in arguments if _is_override(one)]
    if not files:
        raise ConfigError("no run file is given", "name one: lathe launch local configs/demo/pipeline.yaml")
    if any(runfile.job_of(file) == "launch" for file in files):
        pipeline = _from_pipeline(files, overrides)
    else:
        pipeline = _from_run_files(files, overrides)
    stages = tuple(_sized(stage, nodes, tasks, at_once) for stage in pipeline.stages)
    given = {"nodes": (nodes, TrainConfig), "tasks": (tasks, EncodeConfig), "at-once": (at_once, EncodeConfig)}
    for option, (number, kind) in given.items():
        if number is not None and not any(isinstance(stage.config, kind) for stage in stages):
            raise ConfigError(f"--{option}: there is no stage that it is of", "leave it out")
    check_addresses([(stage.name, stage.config) for stage in stages])
    return replace(pipeline, stages=stages)


def _is_override(argument: str) -> bool:
    if _OVERRIDE.match(argument) is None:
        return False
    try:
        return not Path(argument).is_file()
    except OSError:  # longer than a file's name may be
        return True


def _from_pipeline(files: Sequence[str], overrides: Sequence[str]) -> Pipeline:
    file = files[0]
    if len(files) > 1:
        raise ConfigError(f"{', '.join(files)}: a pipeline beside other files", "give one pipeline, or run files")
    own = [one for one in overrides if _first(one) in _FIELDS]
    config = runfile.load(LaunchConfig, file, own)
    for one in overrides:
        if _first(one) not in (*_FIELDS, *config.stages):
            raise ConfigError(
                f"{one}: {file} has no stage {_first(one)}",
                f"write STAGE.FIELD=VALUE with a stage of {', '.join(config.stages)}, or root=VALUE",
            )
    stages = []
    for name, stage in config.stages.items():
        fields = [one.partition(".")[2] for one in overrides if _first(one) == name]
        root = [f"root={runfile.in_line(config.root)}"] if config.root else []
        run_file = _beside(file, stage.config)
        if runfile.job_of(run_file) == "launch":
            raise ConfigError(f"stage {name}: {stage.config} is a pipeline", "name a run file of one command")
        resolved = runfile.load_any(run_file, [*root, *_dotted(stage.set), *fields])
        stages.append(_stage(name, resolved, stage))
    return Pipeline(_tidy(Path(file).stem), tuple(stages))


def _first(override: str) -> str:
    """What an override's dotted name begins with."""
    return re.split("[.=]", override, maxsplit=1)[0]


def _from_run_files(files: Sequence[str], overrides: Sequence[str]) -> Pipeline:
    names = list(_distinct(runfile.job_of(file) for file in files))
    stages = []
    for name, file in zip(names, files, strict=True):
        others = [other for other in names if other != name]
        fields = [one.removeprefix(f"{name}.") for one in overrides if _first(one) not in others]
        stages.append(_stage(name, runfile.load_any(file, fields), StageConfig(config=file)))
    return Pipeline(_tidy(Path(files[0]).stem if len(files) == 1 else "pipeline"), tuple(stages))


def _stage(name: str, config: RunConfig, told: StageConfig) -> Stage:
    stage = Stage(name, config, told.nodes, told.tasks, told.at_once or told.tasks, slurm=told.slurm)
    for what, number, kind, command in (
        ("nodes", told.nodes, TrainConfig, "train"),
        ("tasks", told.tasks, EncodeConfig, "encode"),
        ("at_once", told.at_once or 1, EncodeConfig, "encode"),
    ):
        if number > 1 and not isinstance(config, kind):
            raise ConfigError(
                f"stage {name}: {what}: {number}, but lathe {stage.command} runs alone",
                f"leave it out; only lathe {command} takes several",
            )
    return stage


def _sized(stage: Stage, nodes: int | None, tasks: int | None, at_once: int | None) -> Stage:
    if isinstance(stage.config, TrainConfig):
        return replace(stage, nodes=nodes or stage.nodes)
    if not isinstance(stage.config, EncodeConfig):
        return stage
    tasks = tasks or stage.tasks
    limit = at_once or (stage.at_once if stage.at_once < stage.tasks else tasks)
    return replace(stage, tasks=tasks, at_once=min(limit, tasks))


def _beside(file: str, config: str) -> str:
    """A run file as a pipeline names it: beside its own file, else as from here, or bundled."""
    found = Path(file) if Path(file).is_file() else runfile.bundled(file)
    beside = str(found.parent / config)
    return beside if os.path.isfile(beside) else config  # noqa: PTH113  as above


def _dotted(fields: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested fields as overrides."""
    overrides: list[str] = []
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            overrides += _dotted(value, f"{prefix}{name}.")
        else:
            overrides.append(f"{prefix}{name}={runfile.in_line(value)}")
    return overrides


def _distinct(names: Iterable[str]) -> Iterable[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


def _tidy(name: str) -> str:
    """A name that files, SLURM and Kubernetes take."""
    tidy = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not tidy[:1].isalpha():  # Kubernetes' names begin with a letter
        tidy = f"run-{tidy}"
    return tidy[:_LONGEST_NAME].strip("-")
