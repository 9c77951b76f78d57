"""What a stage asks of a cluster, checked before anything is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline.errors import ConfigError

METRICS_PORT = 9400
OWN_VARIABLES = ("NODES", "NODE_RANK", "NPROC", "MASTER_ADDR", "MASTER_PORT", "LATHE_TASKS")
_LARGEST_RUN_FILE = 1_000_000  # bytes; a ConfigMap holds 1 MiB
_NAME = re.compile("[a-z]([a-z0-9-]*[a-z0-9])?")  # RFC 1035, since it names a Service too
_LABEL = re.compile("[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")

Stage = Literal["encode", "train", "export"]
Kind = Literal["Job", "JobSet", "PyTorchJob"]


@dataclass(frozen=True, kw_only=True)
class KubernetesJob:
    """What one stage of a pipeline asks of a cluster.

    Args:
        name: of all its objects; pods are NAME-INDEX.
        stage: the command. `encode` with one task after others is the finalizing one.
        image: with `tini` and `lathe` on its PATH and the launchers in /opt/lathe/launchers (infra/container).
        run_file: the run file's text, resolved.
        nodes: pods: nodes of a training, tasks of an encode job.
        gpus: of each pod; a rank of the training each, or one CPU rank where there are none.
        cpus: cores that each pod asks for; shared by its ranks.
        memory: of each pod, as Kubernetes writes it.
        kind: of a training: what starts its pods together. PyTorchJob knows no exit codes: all failures are retried.
        namespace: empty = that of whoever applies it.
        run: the run's name as Prometheus is told; empty = `name`.
        environment: variables of the container, taken literally; secrets belong into `secrets`.
        secrets: names of Secrets whose keys become variables, such as AWS_SECRET_ACCESS_KEY.
        service_account: empty = the namespace's default.
        cache_size: of the disk at /cache, for `loader.cache` and downloads.
        cache_class: storage class of a volume of its own for each pod's cache; empty = the node's disk (emptyDir).
        data_claim: PersistentVolumeClaim mounted at /data, for runs that are kept there; many pods want ReadWriteMany.
        metrics_port: of local rank 0; None = metrics are as the run file says, and nobody is told.
        grace_seconds: from SIGTERM to SIGKILL; a checkpoint must fit.
        suspended: made, but not begun until somebody sets `suspend` to false.

    Raises:
        ConfigError: a name, number or variable that Kubernetes or Lathe cannot take.
    """

    name: str
    stage: Stage
    image: str
    run_file: str
    nodes: int = 1
    gpus: int = 0
    cpus: int = 4
    memory: str = "16Gi"
    kind: Kind = "Job"
    namespace: str = ""
    run: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    service_account: str = ""
    cache_size: str = "50Gi"
    cache_class: str = ""
    data_claim: str = ""
    metrics_port: int | None = METRICS_PORT
    grace_seconds: int = 600
    suspended: bool = False

    def __post_init__(self) -> None:
        longest = 63 - len(f"-node-0-{self.nodes - 1}")  # a host name's limit; JobSet's suffix is the longest
        if not _NAME.fullmatch(self.name) or len(self.name) > longest:
            raise ConfigError(
                f"{self.name!r} cannot name a Kubernetes job",
                f"use at most {longest} lower-case letters, digits and hyphens, beginning with a letter",
            )
        if not _LABEL.fullmatch(self.run or self.name):
            raise ConfigError(
                f"run: {self.run!r} cannot be a label", "use at most 63 letters, digits, dots, hyphens and underscores"
            )
        if self.nodes < 1 or self.gpus < 0 or self.cpus < 1:
            raise ConfigError(
                f"{self.nodes} nodes, {self.gpus} GPUs, {self.cpus} cores: there must be something to run on",
                "ask for at least one node and one core",
            )
        if self.stage != "train" and (self.kind != "Job" or self.gpus > 1):
            raise ConfigError(
                f"{self.stage} with {self.gpus} GPUs as {self.kind}: each of its pods is one process of its own",
                "ask for at most one GPU and kind Job; for encode, more nodes are more tasks",
            )
        if self.stage == "export" and self.nodes > 1:
            raise ConfigError(f"export on {self.nodes} nodes: it is one process", "ask for one node")
        if len(self.run_file.encode()) > _LARGEST_RUN_FILE:
            raise ConfigError("the run file is larger than a ConfigMap may be", "name long lists by a file or pattern")
        if taken := sorted({*self.environment} & {*OWN_VARIABLES}):
            raise ConfigError(
                f"environment: {', '.join(taken)} is what the job itself sets",
                "leave it out; the number of nodes and GPUs tells it",
            )

    @property
    def ranks(self) -> int:
        """Processes of each pod."""
        return max(1, self.gpus)

    @property
    def is_served(self) -> bool:
        """Whether its pods tell Prometheus anything."""
        return self.metrics_port is not None and self.stage != "export"

    @property
    def must_meet(self) -> bool:
        """Whether its pods must find each other."""
        return self.stage == "train" and self.nodes > 1

    @property
    def labels(self) -> dict[str, str]:
        """Of all its objects; pods are found by them (infra/prometheus/kubernetes.yml)."""
        labels = {
            "app.kubernetes.io/name": "lathe",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": self.stage,
        }
        return labels | ({"lathe-job": self.stage, "lathe-run": self.run or self.name} if self.is_served else {})
