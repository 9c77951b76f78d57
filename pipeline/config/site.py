"""What a cluster wants of every job: one YAML a site, for `lathe launch`."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from pipeline.config.base import Count, Section

_ONE_WORD = re.compile(r"""[!-~]+""")  # printable ASCII without spaces
_UNSAFE = re.compile(r"""["'\\#`$]""")
_TIME = re.compile(r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_MEMORY = re.compile(r"\d+[KMGT]?")
_QUANTITY = r"^\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?$"  # of Kubernetes
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?", re.DOTALL)
_OURS_ALREADY = (
    *("array", "chdir", "dependency", "error", "export", "job-name", "kill-on-invalid-dep", "nodes", "no-requeue"),
    *("ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
)
_SHELLS = re.compile(r"^~|\$[A-Za-z_{]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(SECRET|PASSWORD|PASSWD|TOKEN|API_KEY)(_|$)", re.IGNORECASE)
_FROM_US = {"PYTHON": "python", "LATHE_INTERFACE": "interface", "TMPDIR": "scratch", "LATHE_SRUN_OPTIONS": "container"}
_FROM_LAUNCHERS = {"NODES", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LATHE_REQUEUE_FILE", "LATHE_TASKS"}


def _scheduler_word(word: str) -> str:
    if not _ONE_WORD.fullmatch(word) or _UNSAFE.search(word):
        raise ValueError("Input should be one word of ASCII, without spaces, quotes, \\, #, $ and `")
    return word


def _scheduler_time(time: Any) -> Any:
    if time is not None and not isinstance(time, str):  # YAML reads 12:00:00 as 43200
        raise ValueError('write it in quotes, such as "12:00:00" or "2-00:00:00"; YAML takes it for a number')
    if time is not None and not _TIME.fullmatch(time):
        raise ValueError('no time of SLURM; write minutes, "HH:MM:SS" or "D-HH:MM:SS"')
    return time


def _scheduler_memory(memory: str) -> str:
    if not _MEMORY.fullmatch(memory):
        raise ValueError("no memory of SLURM; write a number with K, M, G or T behind it, such as 200G")
    return memory


def _option(option: str) -> str:
    if (
        not _OPTION.fullmatch(option)
        or not option.isprintable()
        or not option.isascii()
        or re.search(r'["\\#]', option)
    ):
        raise ValueError('write --NAME or --NAME=VALUE, one option each, in ASCII, without ", \\ and #')
    name = option.removeprefix("--").partition("=")[0]
    ours = [one for one in _OURS_ALREADY if one.startswith(name)]  # SLURM takes the beginning of a name for the name
    if ours:
        raise ValueError(f"--{ours[0]} is set by lathe launch itself; leave --{name} out")
    return option


def _one_line(text: str) -> str:
    if not text.isprintable() or not text:
        raise ValueError("Input should be one line")
    return text


def _place(text: str) -> str:
    if _SHELLS.search(text):  # quoted in scripts, these would be parts of a name
        raise ValueError("write the whole path out: ~ and $VARIABLES are not replaced")
    return text


Word = Annotated[str, AfterValidator(_scheduler_word)]
Line = Annotated[str, AfterValidator(_one_line)]
Place = Annotated[Line, AfterValidator(_place)]
_Command = Literal["pack", "train-vae", "encode", "train", "sample", "evaluate", "export"]
_Text = Annotated[str, Field(coerce_numbers_to_str=True)]


class SlurmConfig(Section):
    """What jobs ask of SLURM; what is not set is left to SLURM."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Annotated[str | None, BeforeValidator(_scheduler_time)] = Field(
        None, description='limit of one run of a job, in quotes: "HH:MM:SS", "D-HH:MM:SS" or minutes'
    )
    gpus_per_node: int | None = Field(
        None, ge=0, le=64, description="of train; encode, train-vae, sample and evaluate take one of them, others none"
    )
    cpus_per_task: Count | None = Field(None, description="of a node of train, or of one worker")
    memory: Annotated[str, AfterValidator(_scheduler_memory)] | None = Field(
        None, description="of a node, such as 200G"
    )
    constraint: Word | None = None
    signal_seconds: int = Field(
        300, ge=1, le=65535, description="before the time limit, a job is asked to save and is queued again"
    )
    extra: tuple[Annotated[str, AfterValidator(_option)], ...] = Field(
        (), description="further options of sbatch, such as --reservation=NAME"
    )

    @property
    def time_seconds(self) -> float:
        """The limit of one run of a job; infinity where there is none, or it is left to SLURM."""
        if self.time is None or self.time in ("UNLIMITED", "INFINITE"):
            return math.inf
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)  # without days one number is minutes
        return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


class ContainerConfig(Section):
    """The image that everything runs in."""

    image: Line = Field(description="address or file of the image, as the runtime takes it")
    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts it on SLURM's nodes")
    mounts: tuple[Line, ...] = Field(
        (), description="SOURCE:TARGET; the submission's folder, the current one and scratch are there anyway"
    )


class KubernetesConfig(Section):
    """What jobs ask of Kubernetes."""

    namespace: str = Field("", description="empty = that of kubectl's context")
    context: str = Field("", description="of kubectl; empty = its current one")
    kind: Literal["Job", "JobSet", "PyTorchJob"] = Field("Job", description="of train: what starts its pods together")
    gpus: int = Field(0, ge=0, le=64, description="of a pod of train; a pod of encode takes one of them, others none")
    cpus: Count = Field(4, description="of each pod")
    memory: str = Field("16Gi", pattern=_QUANTITY, description="of each pod")
    secrets: tuple[str, ...] = Field((), description="Secrets whose keys become variables: S3's keys")
    service_account: str = Field("", description="empty = the namespace's default")
    cache_size: str = Field("50Gi", pattern=_QUANTITY, description="disk of each pod, at /cache")
    cache_class: str = Field("", description="storage class of that disk; empty = the node's own")
    data_claim: str = Field(
        "", description="PersistentVolumeClaim at /data, for runs that are kept there and not on S3"
    )
    metrics_port: int | None = Field(9400, ge=1, le=65535, description="where Prometheus asks; null = nowhere")
    grace_seconds: Count = Field(600, description="a pod that is to end may take this long to save")


class SiteConfig(Section):
    """One cluster, for all runs on it."""

    slurm: SlurmConfig = SlurmConfig()
    slurm_by_command: dict[_Command, SlurmConfig] = Field(
        {}, description="what single commands ask instead, such as export: {partition: cpu}"
    )
    kubernetes: KubernetesConfig = KubernetesConfig()
    kubernetes_by_command: dict[_Command, KubernetesConfig] = Field({}, description="likewise")
    modules: tuple[Word, ...] = Field((), description="environment modules to load, in this order")
    container: ContainerConfig | None = None
    environment: dict[str, _Text] = Field({}, description="variables of every job; no secrets, since scripts are kept")
    interface: Word | None = Field(None, description="network interface between nodes; null = the one that leads there")
    python: Place | None = Field(
        None, description="interpreter that has Lathe, on the nodes; null = the one that submits, in a container python"
    )
    scratch: Place | None = Field(
        None, description="folder of each node for temporary files, as TMPDIR; null = its own"
    )

    @field_validator("kubernetes_by_command")
    @classmethod
    def _stages_are_in_one_place(cls, asked: dict[str, KubernetesConfig]) -> dict[str, KubernetesConfig]:
        for command, own in asked.items():
            for name in ("namespace", "context"):
                if name in own.model_fields_set:
                    raise ValueError(f"{command}.{name}: it is one for all stages; set kubernetes.{name}")
        return asked

    @field_validator("environment")
    @classmethod
    def _variables_can_be_exported(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
            if "\0" in value:
                raise ValueError(f"{name}: a value cannot hold a NUL character")
            if _SECRET.search(name):
                raise ValueError(
                    f"{name}: scripts that hold it are kept; export it in the shell that submits, or use AWS files"
                    " and Kubernetes secrets"
                )
            if name in _FROM_US:
                raise ValueError(f"{name}: set the field {_FROM_US[name]} instead")
            if name in _FROM_LAUNCHERS:
                raise ValueError(f"{name}: the launchers set it for each node; leave it out")
        return environment
