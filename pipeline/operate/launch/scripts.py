"""Batch scripts for SLURM. Values of run files are in none of them: they go to the program in the run file itself."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from pipeline import runfile
from pipeline.config import ContainerConfig, SiteConfig, SlurmConfig
from pipeline.errors import ConfigError
from pipeline.operate.launch.stages import Stage

PYTHON = "python-in-container"
"""File of a submission: the interpreter within an Apptainer image."""
_ONE_GPU = ("encode", "train-vae", "sample", "evaluate")
_LAUNCHERS = {"train": "launchers/slurm_train.sh", "encode": "launchers/slurm_encode.sh"}
_STARTING_AGAIN = {"train-vae": "pipeline.train.first_stage_attempts"}
"""What decides about it, of commands without a launcher of their own."""


def settings(stage: Stage, site: SiteConfig) -> SlurmConfig:
    """What a stage asks of SLURM: the site's, then those of its command, then its own."""
    of_command = site.slurm_by_command.get(stage.command, SlurmConfig())  # type: ignore[call-overload]
    asked = site.slurm.with_changes(of_command, stage.slurm)
    if stage.command == "train" or "gpus_per_node" in of_command.model_fields_set | stage.slurm.model_fields_set:
        return asked
    return asked.model_copy(
        update={"gpus_per_node": min(asked.gpus_per_node or 0, 1 if stage.command in _ONE_GPU else 0)}
    )


def render(stage: Stage, site: SiteConfig, *, name: str, folder: Path, directory: Path) -> str:
    """The batch script of a stage.

    Args:
        stage: what it runs.
        site: the cluster.
        name: of the submission.
        folder: of the submission, absolute.
        directory: that relative paths in the run file begin at, absolute.

    Raises:
        ConfigError: this installation lacks the launchers, a folder cannot be a container's, or there is no time to
            save.
    """
    asked = settings(stage, site)
    exports = {**site.environment, **_variables(site, asked, folder, directory)}
    if stage.command != "train":
        exports.pop("NPROC", None)
    lines = [
        "#!/bin/bash -l" if site.modules else "#!/usr/bin/env bash",  # a login shell knows `module`
        *(f"#SBATCH {option}" for option in _directives(stage, asked, name)),
        f"# Stage {stage.name} of {name}, written by lathe launch. Its run file is beside it.",
        f"cd -- {shlex.quote(str(directory))} || exit 5",
        *(f"module load {shlex.quote(module)} || exit 5" for module in site.modules),
        *(f"export {variable}={shlex.quote(value)}" for variable, value in exports.items()),
        *_program(stage, folder),
    ]
    return "\n".join(lines) + "\n"


def python_in_container(site: SiteConfig, container: ContainerConfig, folder: Path, directory: Path) -> str:
    """The script that is the interpreter where Apptainer runs everything. Raises ConfigError."""
    binds = [part for mount in _mounts(site, container, folder, directory) for part in ("--bind", mount)]
    words = ["apptainer", "exec", "--nv", *binds, container.image, site.python or "python"]
    return f'#!/usr/bin/env bash\nexec {shlex.join(words)} "$@"\n'


def _directives(stage: Stage, asked: SlurmConfig, name: str) -> list[str]:
    options = [f"--job-name={job_name(name, stage.name)}", f"--nodes={stage.nodes}", "--ntasks-per-node=1"]
    if stage.tasks > 1:
        options.append(f"--array=0-{stage.tasks - 1}%{stage.at_once}")
    for option, value in (
        ("partition", asked.partition),
        ("account", asked.account),
        ("qos", asked.qos),
        ("time", asked.time),
        ("gpus-per-node", asked.gpus_per_node or None),
        ("cpus-per-task", asked.cpus_per_task),
        ("mem", asked.memory),
        ("constraint", asked.constraint),
    ):
        if value is not None:
            options.append(f"--{option}={value}")
    options += ["--requeue", "--open-mode=append"]
    if stage.command in (*_LAUNCHERS, *_STARTING_AGAIN):
        if asked.time_seconds <= asked.signal_seconds:
            raise ConfigError(
                f"stage {stage.name}: slurm.time: {asked.time}, which is {asked.time_seconds:.0f} s, is over within"
                f" signal_seconds, {asked.signal_seconds}: it would be asked to stop as it starts, again and again",
                "set a longer time, or a smaller signal_seconds",
            )
        options.append(f"--signal=B:USR1@{asked.signal_seconds}")
    return options + [_quoted(option) for option in asked.extra]


def job_name(name: str, stage: str) -> str:
    """What a job is called in SLURM: it tells our jobs from others that have got the same id."""
    return f"{name}.{stage}"


def _quoted(option: str) -> str:
    """An option as SLURM reads it from a script: it knows double quotes, and they cannot be in it."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if equals and not value.replace("-", "").isalnum() else f"{name}{equals}{value}"


def _variables(site: SiteConfig, asked: SlurmConfig, folder: Path, directory: Path) -> dict[str, str]:
    found = {"PYTHON": site.python or (sys.executable if site.container is None else "python")}
    if site.container is not None and site.container.runtime == "apptainer":
        found["PYTHON"] = str(folder / PYTHON)
    elif site.container is not None:
        mounts = ",".join(_mounts(site, site.container, folder, directory))
        options = [f"--container-image={site.container.image}", f"--container-mounts={mounts}"]
        found["LATHE_SRUN_OPTIONS"] = "\n".join([*options, f"--container-workdir={directory}"])
    if asked.cpus_per_task:
        found["SRUN_CPUS_PER_TASK"] = str(asked.cpus_per_task)  # srun does not take it from the job
    if asked.gpus_per_node:
        found["NPROC"] = str(asked.gpus_per_node)
    if site.interface:
        found["LATHE_INTERFACE"] = site.interface
    if site.scratch:
        found["TMPDIR"] = site.scratch
    return found


def _mounts(site: SiteConfig, container: ContainerConfig, folder: Path, directory: Path) -> list[str]:
    own = list(dict.fromkeys([str(folder), str(directory), *([site.scratch] if site.scratch else [])]))
    for place in own:
        if any(sign in place for sign in ":,\n"):
            raise ConfigError(
                f"{place}: a container cannot mount a folder with a colon, a comma or a line end in its name",
                "launch from another folder, and choose one with --folder",
            )
    return list(dict.fromkeys([*(f"{place}:{place}" for place in own), *container.mounts]))


def _program(stage: Stage, folder: Path) -> list[str]:
    run_file = shlex.quote(str(folder / f"{stage.name}.yaml"))
    if launcher := _LAUNCHERS.get(stage.command):
        return [f"exec bash {shlex.quote(str(runfile.bundled(launcher).resolve()))} {run_file}"]
    decides = _STARTING_AGAIN.get(stage.command)
    return [
        "asked=''",
        "trap 'asked=1' USR1 TERM",
        f"set -- {run_file}",
        f"source {shlex.quote(str(runfile.bundled('launchers/slurm_step.sh').resolve()))} || exit 5",
        f'run_step --ntasks=1 "$PYTHON" -m pipeline {stage.command} "$@"',
        f'end_job {decides} "$@"' if decides else 'exit "$code"',
    ]
