"""JSON schemas of the custom objects that infra/kubernetes has: of the fields used, and no others.

The whole definitions are not to be had as a package. These are written after the types of the projects: JobSet's
`api/jobset/v1alpha2/jobset_types.go`, the training operator's `pkg/apis/kubeflow.org/v1` (common and PyTorchJob), the
Prometheus operator's `pkg/apis/monitoring/v1` (PodMonitor, PrometheusRule). Pods and Jobs inside are validated by
Kubernetes's own schemas.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
DURATION: Schema = {"type": "string", "pattern": "^(0|([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?)$"}
TEXTS: Schema = {"type": "array", "items": TEXT, "minItems": 1, "uniqueItems": True}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
INSIDE: Schema = {"type": "object"}  # validated by itself


def closed(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def named(*values: str) -> Schema:
    return {"enum": [*values]}


def custom(version: str, kind: str, spec: Schema) -> Schema:
    metadata = closed("name", name=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
    parts = {"apiVersion": named(version), "kind": named(kind), "metadata": metadata, "spec": spec}
    return closed("apiVersion kind metadata spec", **parts)


JOB_SET = closed(
    "replicatedJobs",
    network=closed(enableDNSHostnames=FLAG, subdomain=TEXT, publishNotReadyAddresses=FLAG),
    failurePolicy=closed(
        maxRestarts=COUNT,
        restartStrategy=named("Recreate", "BlockingRecreate", "InPlaceRestart"),
        rules=several(
            closed(
                "name action",
                name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                action=named("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                onJobFailureReasons={
                    "type": "array",
                    "items": named(
                        "BackoffLimitExceeded",
                        "DeadlineExceeded",
                        "FailedIndexes",
                        "MaxFailedIndexesExceeded",
                        "PodFailurePolicy",
                    ),
                },
            )
        ),
    ),
    suspend=FLAG,
    ttlSecondsAfterFinished=COUNT,
    replicatedJobs=several(closed("name template", name=TEXT, replicas=COUNT, template=closed("spec", spec=INSIDE))),
)

REPLICA = closed(
    "template",
    replicas=COUNT,
    restartPolicy=named("Always", "OnFailure", "Never", "ExitCode"),
    template=closed("spec", metadata=closed(labels=LABELS), spec=INSIDE),
)
PYTORCH_JOB = closed(
    "pytorchReplicaSpecs",
    runPolicy=closed(
        backoffLimit=COUNT,
        cleanPodPolicy=named("All", "Running", "None"),
        suspend=FLAG,
        ttlSecondsAfterFinished=COUNT,
    ),
    pytorchReplicaSpecs=closed("Master", Master=REPLICA, Worker=REPLICA),
)

LABEL_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}
POD_MONITOR = closed(
    "selector podMetricsEndpoints",
    selector=closed("matchLabels", matchLabels=LABELS),
    podMetricsEndpoints=several(
        closed(
            path=TEXT,
            interval=DURATION,
            relabelings=several(
                closed(
                    sourceLabels=several(LABEL_NAME),
                    regex=TEXT,
                    targetLabel=LABEL_NAME,
                    replacement=TEXT,
                    action=named("replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"),
                )
            ),
        )
    ),
)

NUMBER_OR_TEXT: Schema = {"type": ["integer", "string"]}
RULE = closed("expr", record=TEXT, alert=TEXT, expr=NUMBER_OR_TEXT, labels=LABELS, annotations=LABELS)
RULE["properties"]["for"] = DURATION
RULE["oneOf"] = [{"required": ["record"]}, {"required": ["alert"]}]
PROMETHEUS_RULE = closed(
    "groups", groups=several(closed("name rules", name=TEXT, interval=DURATION, rules=several(RULE)))
)

CUSTOM: dict[str, Schema] = {
    "JobSet": custom("jobset.x-k8s.io/v1alpha2", "JobSet", JOB_SET),
    "PyTorchJob": custom("kubeflow.org/v1", "PyTorchJob", PYTORCH_JOB),
    "PodMonitor": custom("monitoring.coreos.com/v1", "PodMonitor", POD_MONITOR),
    "PrometheusRule": custom("monitoring.coreos.com/v1", "PrometheusRule", PROMETHEUS_RULE),
}


def inside(thing: dict[str, Any]) -> list[dict[str, Any]]:
    """Kubernetes's own objects that a custom one makes."""
    if thing["kind"] == "JobSet":
        jobs = [replicated["template"] for replicated in thing["spec"]["replicatedJobs"]]
        return [{"apiVersion": "batch/v1", "kind": "Job", "metadata": thing["metadata"], **job} for job in jobs]
    if thing["kind"] == "PyTorchJob":
        pods = [replica["template"] for replica in thing["spec"]["pytorchReplicaSpecs"].values()]
        return [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in pods]
    return []
