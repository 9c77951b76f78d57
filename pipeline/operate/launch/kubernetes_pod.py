"""The pods of a stage: what they run, as whom, and how the kubelet looks after them."""

from __future__ import annotations

from typing import Any

from pipeline.operate.launch.kubernetes_job import KubernetesJob

RUN_FILE = "/etc/lathe/run.yaml"
LAUNCHER = "/opt/lathe/launchers/accelerate.sh"
CACHE, DATA, TEMPORARY = "/cache", "/data", "/tmp"  # noqa: S108
MASTER_PORT = 29500
USER = 10001
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
# Generous: the server answers throughout steps and saves, and a silent one is a process that nothing else would end.
_STARTUP = {"periodSeconds": 30, "failureThreshold": 240, "timeoutSeconds": 10}  # 2 h to meet and read a checkpoint
_LIVENESS = {"periodSeconds": 60, "failureThreshold": 20, "timeoutSeconds": 30}  # 20 min of silence


def template(job: KubernetesJob, master: str) -> dict[str, Any]:
    """A pod template of a stage.

    Args:
        job: the stage.
        master: name of the pod of rank 0; empty = somebody else tells it to the pods.
    """
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, master)],
        "volumes": _volumes(job),
    }
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    if job.must_meet:
        spec["subdomain"] = job.name
    if job.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": job.labels}, "spec": spec}


def _container(job: KubernetesJob, master: str) -> dict[str, Any]:
    amount: dict[str, Any] = {"memory": job.memory} | ({"nvidia.com/gpu": job.gpus} if job.gpus else {})
    disk = {} if job.cache_class else {"ephemeral-storage": job.cache_size}
    container: dict[str, Any] = {
        "name": "lathe",
        "image": job.image,
        "command": ["tini", "--"],  # PID 1: what it starts can be ended by signals before it has handlers
        "args": _arguments(job),
        "workingDir": TEMPORARY,
        "env": _environment(job, master),
        "resources": {"requests": {"cpu": job.cpus, **amount, **disk}, "limits": dict(amount)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "run", "mountPath": "/etc/lathe", "readOnly": True},
            {"name": "tmp", "mountPath": TEMPORARY},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "cache", "mountPath": CACHE},
            *([{"name": "data", "mountPath": DATA}] if job.data_claim else ()),
        ],
    }
    if job.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in job.secrets]
    return container | _served(job)


def _arguments(job: KubernetesJob) -> list[str]:
    """Constants, and no value of the run file: Kubernetes replaces $(...) in them."""
    program = [LAUNCHER] if job.stage == "train" else ["lathe", job.stage]
    told = (
        ["metrics.prometheus=true", "metrics.host=0.0.0.0", f"metrics.port={job.metrics_port}"] if job.is_served else []
    )
    return [*program, RUN_FILE, *told]


def _environment(job: KubernetesJob, master: str) -> list[dict[str, Any]]:
    values = {
        "HOME": TEMPORARY,
        "TMPDIR": TEMPORARY,
        "XDG_CACHE_HOME": CACHE,
        "OMP_NUM_THREADS": str(max(1, job.cpus // job.ranks)),  # the machine's cores are not the pod's
        **{name: value.replace("$", "$$") for name, value in job.environment.items()},
    }
    if job.stage == "encode":
        values["LATHE_TASKS"] = str(job.nodes)
    if job.stage == "train":
        values |= {"NODES": str(job.nodes), "NPROC": str(job.ranks)}
    if job.must_meet and master:
        values |= {"MASTER_ADDR": master, "MASTER_PORT": str(MASTER_PORT)}
    listed: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    if job.must_meet and master:
        listed.append({"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}})
    return listed


def _served(job: KubernetesJob) -> dict[str, Any]:
    """Ports of the ranks, named as infra/prometheus/kubernetes.yml asks for, and probes of the first."""
    if not job.is_served or job.metrics_port is None:
        return {}
    names = ["metrics"] if job.ranks == 1 else [f"metrics-{rank}" for rank in range(job.ranks)]
    return {
        "ports": [{"name": name, "containerPort": job.metrics_port + rank} for rank, name in enumerate(names)],
        "startupProbe": {"httpGet": {"path": "/metrics", "port": names[0]}, **_STARTUP},
        "livenessProbe": {"httpGet": {"path": "/metrics", "port": names[0]}, **_LIVENESS},
    }


def _volumes(job: KubernetesJob) -> list[dict[str, Any]]:
    cache: dict[str, Any] = {"emptyDir": {"sizeLimit": job.cache_size}}
    if job.cache_class:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": job.cache_class,
            "resources": {"requests": {"storage": job.cache_size}},
        }
        cache = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    data = {"name": "data", "persistentVolumeClaim": {"claimName": job.data_claim}}
    return [
        {"name": "run", "configMap": {"name": job.name}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}},  # NCCL's; 64 MiB otherwise
        {"name": "cache", **cache},
        *([data] if job.data_claim else ()),
    ]
