"""Kubernetes objects: counts that must agree, exit codes, strings that stay as they are, pods without rights."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import runfile
from pipeline.config import EncodeConfig, EngineConfig, ExportConfig, RunConfig, TrainConfig
from pipeline.encode.share import find_share
from pipeline.errors import ConfigError, DataError, LatheError, SetupError, StorageError
from pipeline.operate.launch.kubernetes import manifests
from pipeline.operate.launch.kubernetes_job import KubernetesJob
from pipeline.operate.launch.kubernetes_pod import LAUNCHER, RUN_FILE
from pipeline.train import preemption

ROOT = Path(__file__).parents[3]
SCRAPING = yaml.safe_load((ROOT / "infra/prometheus/kubernetes.yml").read_text())["scrape_configs"][0]
NASTY = 'it\'s "one"; $(rm -rf ~) $HOME `id` $$ $(NODES)\n- second: line\té 猫 #'
CONFIGS: dict[str, type[RunConfig]] = {"encode": EncodeConfig, "train": TrainConfig, "export": ExportConfig}


def job(stage: Any = "train", **changes: Any) -> KubernetesJob:
    return KubernetesJob(name="sd15", stage=stage, image="lathe:cuda", run_file="job: x\n", **changes)


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pod template among the objects."""
    main = objects[-1]["spec"]
    if objects[-1]["kind"] == "JobSet":
        return [replicated["template"]["spec"]["template"] for replicated in main["replicatedJobs"]]
    if objects[-1]["kind"] == "PyTorchJob":
        return [replica["template"] for replica in main["pytorchReplicaSpecs"].values()]
    return [main["template"]]


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return pods(objects)[0]["spec"]["containers"][0]


def variables(objects: list[dict[str, Any]]) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container(objects)["env"]}


def expanded(text: str, known: dict[str, str]) -> str:
    """What the kubelet makes of arguments and values: $$ is a dollar, $(KNOWN) its value, all else stays."""
    return re.sub(r"\$(\$|\((.*?)\))", lambda m: "$" if m[1] == "$" else known.get(m[2], m[0]), text)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (1, 8), (3, 1), (64, 8)])
def test_counts_of_a_training_agree(nodes, gpus):
    objects = manifests(job(nodes=nodes, gpus=gpus, cpus=24))
    spec, told, resources = only(objects, "Job")["spec"], variables(objects), container(objects)["resources"]
    assert spec["completionMode"] == "Indexed"
    assert int(told["NODES"]) == spec["completions"] == spec["parallelism"] == nodes
    assert spec["backoffLimit"] == 3 * nodes
    assert int(told["NPROC"]) == max(1, gpus) == len(container(objects)["ports"])
    assert resources["limits"].get("nvidia.com/gpu", 0) == resources["requests"].get("nvidia.com/gpu", 0) == gpus
    assert int(told["OMP_NUM_THREADS"]) == 24 // max(1, gpus)


def test_encode_tasks_are_counted_for_shares():
    objects = manifests(job("encode", nodes=8, gpus=1))
    spec = only(objects, "Job")["spec"]
    told = {**variables(objects), "JOB_COMPLETION_INDEX": "3"}  # which Kubernetes adds
    assert str(find_share(None, told)) == "share 3/8: Kubernetes Job index 3 of 8, counted from 0"
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (8, 8, 24)
    assert "Service" not in [one["kind"] for one in objects], "tasks do not talk to each other"


def test_ranks_meet_at_the_first_pod():
    objects = manifests(job(nodes=2, namespace="ai"))
    service, main, told = only(objects, "Service"), only(objects, "Job"), variables(objects)
    template = main["spec"]["template"]
    host, domain = told["MASTER_ADDR"].split(".")
    assert host == f"{main['metadata']['name']}-0"  # the host name that an Indexed Job gives its first pod
    assert domain == service["metadata"]["name"] == template["spec"]["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert int(told["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]
    (rank,) = [one for one in container(objects)["env"] if one["name"] == "NODE_RANK"]
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
    assert {one["metadata"]["namespace"] for one in objects} == {"ai"}


def test_a_job_set_names_its_first_pod_and_starts_all_anew():
    objects = manifests(job(nodes=4, gpus=8, kind="JobSet"))
    spec, told = objects[-1]["spec"], variables(objects)
    (replicated,) = spec["replicatedJobs"]
    indexed = replicated["template"]["spec"]
    assert told["MASTER_ADDR"] == f"sd15-{replicated['name']}-0-0.{spec['network']['subdomain']}"
    assert int(told["NODES"]) == indexed["completions"] == indexed["parallelism"] == 4
    assert (indexed["backoffLimit"], spec["failurePolicy"]["maxRestarts"]) == (0, 3)
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"]), "JobSet's own pattern"
    assert indexed["podFailurePolicy"] == only(manifests(job(nodes=4)), "Job")["spec"]["podFailurePolicy"]
    assert [one["kind"] for one in objects] == ["ConfigMap", "JobSet"], "the service is JobSet's"


def test_pods_of_a_pytorch_job_know_their_node(tmp_path):
    objects = manifests(job(nodes=3, gpus=8, kind="PyTorchJob"))
    replicas = objects[-1]["spec"]["pytorchReplicaSpecs"]
    assert {role: replica["replicas"] for role, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert variables(objects)["NODES"] == "3"
    assert "MASTER_ADDR" not in variables(objects), "the operator's"
    assert container(objects)["name"] == "pytorch", "the operator looks for it by name"
    told = container(objects)["args"]
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\necho "$NODE_RANK ${RANK-none} ${WORLD_SIZE-none} $1"\n')
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    pod = {"RANK": "2", "WORLD_SIZE": "3", "PATH": os.environ["PATH"]}
    arguments = [expanded(word, pod) if word != LAUNCHER else str(launcher) for word in told]
    done = subprocess.run(arguments, env=pod, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "none", "none", RUN_FILE]


def verdict(code: int, *, disrupted: bool = False) -> str:
    """What becomes of a pod that ended so; Kubernetes takes the first rule that fits."""
    for rule in only(manifests(job(nodes=2)), "Job")["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"containerName": "lathe", "operator": "In", "values": []})
        assert (codes["containerName"], codes["operator"]) == ("lathe", "In")
        conditions = [(one["type"], one["status"]) for one in rule.get("onPodConditions", ())]
        if code in codes["values"] or (disrupted and ("DisruptionTarget", "True") in conditions):
            return str(rule["action"])
    return "Count"


def test_exit_codes_decide_who_starts_again():
    assert [verdict(error.exit_code) for error in (ConfigError, DataError, SetupError)] == ["FailJob"] * 3
    assert [verdict(error.exit_code) for error in (LatheError, StorageError)] == ["Count"] * 2, "time may mend these"
    assert [verdict(128 + number) for number in preemption._SIGNALS] == ["Ignore"] * 5, "asked to stop: saved"
    assert verdict(137) == "Count", "out of memory, or killed"
    assert verdict(137, disrupted=True) == "Ignore", "evicted"
    assert only(manifests(job()), "Job")["spec"]["template"]["spec"]["restartPolicy"] == "Never", "else no rule counts"


def test_nothing_of_a_run_file_or_variable_is_interpreted():
    objects = manifests(job("encode", nodes=2, environment={"CAPTION": NASTY, "EMPTY": ""}))
    objects[0] = only(manifests(replace(job("encode"), run_file=f"root: {NASTY!r}\n{NASTY}")), "ConfigMap")
    text = yaml.safe_dump_all(objects)
    assert "&id" not in text, "no two places share a mapping: others may change one"
    read = list(yaml.safe_load_all(text))
    assert read[0]["data"]["run.yaml"] == f"root: {NASTY!r}\n{NASTY}"
    known = {one["name"]: one.get("value", "") for one in container(read)["env"]}
    assert expanded(known["CAPTION"], {"NODES": "9", "HOME": "/", **known}) == NASTY
    words = [*container(read)["command"], *container(read)["args"]]
    assert not {"sh", "bash", "-c"} & set(words)
    assert all(re.fullmatch(r"[a-z0-9./=_-]+", word) for word in words)


@pytest.mark.parametrize("stage", ["encode", "train", "export"])
def test_the_command_is_one_that_lathe_takes(stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = container(manifests(job(stage)))["args"]
    assert words[: words.index(RUN_FILE)] == ([LAUNCHER] if stage == "train" else ["lathe", stage])
    overrides = words[words.index(RUN_FILE) + 1 :]
    config = runfile.load(CONFIGS[stage], f"configs/demo/{stage}.yaml", overrides)
    if not isinstance(config, ExportConfig):
        assert config.metrics.prometheus is True
        assert (config.metrics.host, config.metrics.port) == ("0.0.0.0", 9400)  # noqa: S104
    assert (ROOT / "launchers" / Path(LAUNCHER).name).is_file()


@pytest.mark.parametrize("gpus", [0, 4])
def test_prometheus_finds_every_rank(gpus):
    template = pods(manifests(job(nodes=2, gpus=gpus, run="sd15-256px")))[0]
    labels, ports = template["metadata"]["labels"], template["spec"]["containers"][0]["ports"]
    (selector,) = SCRAPING["kubernetes_sd_configs"][0]["selectors"]
    key, value = selector["label"].split("=")
    assert labels[key] == value
    assert (labels["lathe-job"], labels["lathe-run"]) == ("train", "sd15-256px")
    (keep,) = [s for s in SCRAPING["relabel_configs"] if "container_port_name" in s["source_labels"][0]]
    assert all(re.fullmatch(keep["regex"], port["name"]) for port in ports)
    assert [port["containerPort"] for port in ports] == [9400 + rank for rank in range(max(1, gpus))]


def test_a_pod_that_serves_nothing_is_not_asked():
    for silent in (job(metrics_port=None), job("export")):
        objects = manifests(silent)
        assert "lathe-job" not in pods(objects)[0]["metadata"]["labels"]
        assert not {"ports", "livenessProbe", "startupProbe"} & set(container(objects))
        assert container(objects)["args"][-1] == RUN_FILE


def test_probes_outlast_what_lathe_itself_ends():
    alive, begun = (container(manifests(job()))[name] for name in ("livenessProbe", "startupProbe"))
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 2 * EngineConfig().timeout_seconds
    assert begun["periodSeconds"] * begun["failureThreshold"] >= 3600
    assert pods(manifests(job(grace_seconds=1200)))[0]["spec"]["terminationGracePeriodSeconds"] == 1200


@pytest.mark.parametrize("kind", ["Job", "JobSet", "PyTorchJob"])
def test_pods_fit_the_restricted_profile(kind):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a root that is read only."""
    for template in pods(manifests(job(nodes=2, gpus=8, kind=kind, data_claim="runs", cache_class="nvme"))):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
        (only_one,) = spec["containers"]
        own = only_one["securityContext"]
        assert (own["allowPrivilegeEscalation"], own["readOnlyRootFilesystem"]) == (False, True)
        assert own["capabilities"] == {"drop": ["ALL"]}
        writable = {mount["mountPath"] for mount in only_one["volumeMounts"] if not mount.get("readOnly")}
        folders = {one["name"]: one.get("value") for one in only_one["env"]}
        assert {folders["HOME"], folders["TMPDIR"], folders["XDG_CACHE_HOME"], only_one["workingDir"]} <= writable


def test_secrets_volumes_and_suspension():
    objects = manifests(
        job(secrets=("s3",), service_account="train", cache_class="nvme", cache_size="1Ti", data_claim="d")
    )
    spec = pods(objects)[0]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    claim = volumes["cache"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("nvme", "1Ti")
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "d"
    assert {mount["name"] for mount in container(objects)["volumeMounts"]} == set(volumes)
    assert container(objects)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert spec["serviceAccountName"] == "train"
    for kind, path in (("Job", ()), ("JobSet", ()), ("PyTorchJob", ("runPolicy",))):
        for suspended in (False, True):
            where = manifests(job(kind=kind, suspended=suspended))[-1]["spec"]
            for step in path:
                where = where[step]
            assert where["suspend"] is suspended


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "Sd15"}, "'Sd15' cannot name"),
        ({"name": "1st"}, "'1st' cannot name"),
        ({"name": "a" * 60}, "cannot name"),
        ({"name": "x; rm -rf ~"}, "cannot name"),
        ({"run": "two words"}, "run: 'two words'"),
        ({"nodes": 0}, "0 nodes"),
        ({"stage": "encode", "gpus": 8}, "encode with 8 GPUs"),
        ({"stage": "export", "kind": "JobSet"}, "export with 0 GPUs as JobSet"),
        ({"stage": "export", "nodes": 2}, "export on 2 nodes"),
        ({"environment": {"NODE_RANK": "0"}}, "NODE_RANK"),
        ({"run_file": "x" * 1_000_001}, "larger than a ConfigMap"),
    ],
)
def test_what_cannot_be_is_told(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as told:
        replace(job(), **changes)
    assert told.value.remedy
