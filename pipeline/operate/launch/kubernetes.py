"""Lathe's jobs as Kubernetes objects: mappings that are valid YAML and JSON.

A stage is an Indexed Job whose pods never restart in place: whether a pod that failed is replaced, its exit code says
(`pipeline.errors`, docs/operations.md). No shell sees a value of the run file, which is mounted from a ConfigMap.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError, DataError, SetupError
from pipeline.operate.launch.kubernetes_job import KubernetesJob
from pipeline.operate.launch.kubernetes_pod import MASTER_PORT, template

__all__ = ["KubernetesJob", "manifests"]

RETRIES = 3
KEPT_SECONDS = 7 * 24 * 3600
"""For so long a Job that has ended can be asked about."""
_NO_START_MENDS = sorted({ConfigError.exit_code, DataError.exit_code, SetupError.exit_code})
_STOPPED = [129, 130, 138, 140, 143]  # 128 + SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGTERM: a checkpoint was saved

Object = dict[str, Any]


def manifests(job: KubernetesJob) -> list[Object]:
    """The objects that run a stage, in the order in which they are to be made."""
    run_file = {"immutable": True, "data": {"run.yaml": job.run_file}}
    objects = [_object(job, "v1", "ConfigMap") | run_file]
    if job.kind == "JobSet":
        return [*objects, _job_set(job)]
    if job.kind == "PyTorchJob":
        return [*objects, _pytorch_job(job)]
    if job.must_meet:
        objects.append(_service(job))
    return [*objects, _object(job, "batch/v1", "Job") | {"spec": _job_spec(job)}]


def _object(job: KubernetesJob, version: str, kind: str) -> Object:
    metadata: Object = {"name": job.name, "labels": job.labels}
    if job.namespace:
        metadata["namespace"] = job.namespace
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _service(job: KubernetesJob) -> Object:
    """A name for each pod, also before it is ready: ranks meet first."""
    return _object(job, "v1", "Service") | {
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app.kubernetes.io/instance": job.name, "app.kubernetes.io/component": job.stage},
            "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
        }
    }


def _job_spec(job: KubernetesJob) -> Object:
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": RETRIES * job.nodes,  # one lost rank ends all pods of a training
        "podFailurePolicy": {
            "rules": [
                _exit_codes("FailJob", _NO_START_MENDS),
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                _exit_codes("Ignore", _STOPPED),
            ]
        },
        "suspend": job.suspended,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "template": template(job, master=f"{job.name}-0.{job.name}"),
    }


def _exit_codes(action: str, codes: list[int]) -> Object:
    return {"action": action, "onExitCodes": {"containerName": "lathe", "operator": "In", "values": codes}}


def _job_set(job: KubernetesJob) -> Object:
    """https://jobset.sigs.k8s.io: one failed pod starts all of them anew."""
    pod = template(job, master=f"{job.name}-node-0-0.{job.name}")
    pod["spec"].pop("subdomain", None)  # JobSet's own
    spec = _job_spec(job) | {"backoffLimit": 0, "template": pod}
    for of_set in ("suspend", "ttlSecondsAfterFinished"):
        del spec[of_set]
    user_error = {"name": "userError", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return _object(job, "jobset.x-k8s.io/v1alpha2", "JobSet") | {
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": RETRIES, "rules": [user_error]},
            "suspend": job.suspended,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": spec}}],
        }
    }


def _pytorch_job(job: KubernetesJob) -> Object:
    """Kubeflow's training operator, version 1, which tells each pod MASTER_ADDR, MASTER_PORT and RANK."""
    roles = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    return _object(job, "kubeflow.org/v1", "PyTorchJob") | {
        "spec": {
            "runPolicy": {
                "backoffLimit": RETRIES * job.nodes,
                "cleanPodPolicy": "None",
                "suspend": job.suspended,
                "ttlSecondsAfterFinished": KEPT_SECONDS,
            },
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": _operated(job)}
                for role, count in roles.items()
            },
        }
    }


def _operated(job: KubernetesJob) -> Object:
    """The pod as the training operator wants it. RANK is the pod's; the kubelet puts it into the arguments."""
    pod = template(job, master="")
    for its_own in ("restartPolicy", "subdomain"):
        pod["spec"].pop(its_own, None)
    (container,) = pod["spec"]["containers"]
    ports = [*container.get("ports", ()), {"name": "pytorchjob-port", "containerPort": MASTER_PORT}]
    node_rank = ["env", "-u", "RANK", "-u", "WORLD_SIZE", "NODE_RANK=$(RANK)"]  # each rank is told others of these
    container |= {"name": "pytorch", "ports": ports, "args": [*node_rank, *container["args"]]}
    return pod
