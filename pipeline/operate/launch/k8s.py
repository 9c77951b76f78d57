"""`lathe launch k8s`: a pipeline as Kubernetes Jobs, each made once the one before has finished."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml

from pipeline import runfile
from pipeline.config import KubernetesConfig, SiteConfig
from pipeline.console import tell
from pipeline.errors import ConfigError, LatheError, SetupError
from pipeline.operate.launch import programs
from pipeline.operate.launch.addresses import local_addresses, local_models
from pipeline.operate.launch.kubernetes import manifests
from pipeline.operate.launch.kubernetes_job import KubernetesJob
from pipeline.operate.launch.kubernetes_job import Stage as Command
from pipeline.operate.launch.sequence import begin, run_in_order
from pipeline.operate.launch.stages import Pipeline, Stage
from pipeline.operate.launch.submissions import StageRecord, Submission, plan
from pipeline.stopping import not_ignored

POLL_SECONDS, PATIENCE_SECONDS = 5.0, 3600.0  # between questions; for a cluster that answers none
_NO_TEXT_TO_OTHERS = re.compile(r"[yYnN]|[-+.\d][\w.+-]*")  # to kubectl y is true, and 1e3 a number
_COMMANDS = ("encode", "train", "export")
_DATA = "/data/"
_RESOURCES = {"Job": "job.batch", "JobSet": "jobset.jobset.x-k8s.io", "PyTorchJob": "pytorchjob.kubeflow.org"}
_INSTALL = "install kubectl, and point it at the cluster; --dry-run shows what would be made"


class KubernetesError(LatheError):
    """The cluster does not answer, has refused an object, or a Job has failed."""

    exit_code = SetupError.exit_code


class GoneError(KubernetesError):
    """There is no such object."""


def launch(pipeline: Pipeline, site: SiteConfig, parent: Path | None, directory: Path, *, waits: bool) -> Submission:
    """Make each stage's objects, and wait for its end before the next: plain Jobs cannot wait for each other.

    Args:
        pipeline: the stages, finalizers among them.
        site: the cluster.
        parent: folder of submissions; None = `lathe-launches` here.
        directory: where it is launched from.
        waits: for the last stage too.

    Raises:
        ConfigError: what a pod cannot do: another command, an address that it does not have, no image.
        SetupError: no kubectl.
        KubernetesError: the cluster refuses, or a Job has failed; the same command goes on from there.
    """
    programs.found("kubectl", _INSTALL)
    _objects(plan(pipeline, "k8s", parent, directory), pipeline.stages, site)  # a mistake in any is told before all
    submission = begin(pipeline, "k8s", parent, directory, _note_finished)
    submission.record.namespace = site.kubernetes.namespace
    submission.record.context = site.kubernetes.context
    last = pipeline.stages[-1]
    for number in not_ignored((signal.SIGTERM, signal.SIGHUP)):  # so that the record tells that nobody waits
        signal.signal(number, signal.default_int_handler)
    tell("Ctrl-C leaves the Jobs alone; the same command goes on waiting, and makes those that are still to come")

    def run(stage: Stage) -> bool:
        _make(submission, stage, site)
        if waits or stage is not last:
            _wait(submission, stage)
            return True
        return False

    run_in_order(submission, pipeline, run)
    return submission


def dry_run(pipeline: Pipeline, site: SiteConfig, parent: Path | None, directory: Path) -> str:
    """Everything that would be made, as YAML for `kubectl apply -f`. Raises ConfigError, as `launch`."""
    submission = plan(pipeline, "k8s", parent, directory)
    parts = []
    for stage, objects in zip(pipeline.stages, _objects(submission, pipeline.stages, site), strict=True):
        first = "" if stage is pipeline.stages[0] else ", once the stage before has finished"
        parts.append(f"# stage {stage.name}{first}\n{_text(objects)}")
    return "---\n".join(parts)


def kubectl(submission: Submission, *arguments: str) -> list[str]:
    """A command line of kubectl for a submission's cluster and namespace."""
    options = [
        *(["--context", submission.record.context] if submission.record.context else []),
        *(["--namespace", submission.record.namespace] if submission.record.namespace else []),
    ]
    return [programs.found("kubectl", _INSTALL), *options, *arguments]


def ask(submission: Submission, *arguments: str, stdin: str | None = None) -> str:
    """What kubectl says, which succeeds. Raises SetupError, GoneError, KubernetesError."""
    code, out, err = programs.said_by(kubectl(submission, *arguments), stdin=stdin)
    if code == 0:
        return out
    said = programs.complaint(err, code)
    if "(NotFound)" in said:
        raise GoneError(f"kubectl: {said}", "it was deleted, or never made")
    if "refused" in said or "Unable to connect" in said or "no such host" in said:
        raise KubernetesError(f"the cluster does not answer: {said}", "check kubectl cluster-info, then try again")
    raise KubernetesError(f"kubectl {arguments[0]}: {said}", "mend what it names, then run the same command again")


def state_of(submission: Submission, resource: str) -> tuple[str, str]:
    """State of a stage's Job: waiting, running, finished or failed; and what the cluster says of it.

    Raises:
        GoneError: it was deleted.
        KubernetesError: the cluster does not answer.
    """
    status: dict[str, Any] = json.loads(ask(submission, "get", resource, "--output=json")).get("status", {})
    holding = {one["type"]: one for one in status.get("conditions", ()) if one.get("status") == "True"}
    for condition, state in (
        ("Complete", "finished"),
        ("Completed", "finished"),
        ("Succeeded", "finished"),
        ("Failed", "failed"),
    ):
        if condition in holding:
            why = holding[condition].get("message", "") if state == "failed" else ""
            return state, why
    parts = [status, *status.get("replicatedJobsStatus", ())]  # a JobSet counts its Jobs
    counts = {name: sum(part.get(name) or 0 for part in parts) for name in ("active", "ready", "succeeded", "failed")}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    begun = counts["ready" if any("ready" in part for part in parts) else "active"]  # pods are active unplaced too
    return ("running" if begun or "Running" in holding else "waiting"), said


def delete(submission: Submission, stage: StageRecord) -> None:
    """Delete a stage's objects, the run file's ConfigMap and the Service among them. Raises KubernetesError."""
    ask(submission, "delete", "-f", str(_file(submission, stage)), "--ignore-not-found", "--wait=false")


def _file(submission: Submission, stage: StageRecord) -> Path:
    return submission.folder / f"{stage.name}.kubernetes.yaml"


def _note_finished(submission: Submission) -> None:
    """Of stages that nobody waited for."""
    for stage in submission.record.stages:
        if stage.id and stage.exit_code is None:
            with suppress(GoneError):
                if state_of(submission, stage.id)[0] == "finished":
                    stage.exit_code = 0
    submission.save()


def _objects(submission: Submission, stages: Sequence[Stage], site: SiteConfig) -> list[list[dict[str, Any]]]:
    return [manifests_of(submission, stage, site) for stage in stages]


def manifests_of(submission: Submission, stage: Stage, site: SiteConfig) -> list[dict[str, Any]]:
    """The objects of a stage. Raises ConfigError."""
    if stage.command not in _COMMANDS:
        raise ConfigError(
            f"stage {stage.name}: lathe {stage.command} is not run on Kubernetes",
            f"run it elsewhere first; {', '.join(_COMMANDS)} are",
        )
    if site.container is None:
        raise ConfigError("container: missing; Kubernetes needs an image", "set container.image in the site's file")
    asked = _settings(stage, site)
    for address in local_addresses(stage.config):
        if not asked.data_claim or not address.startswith(_DATA):
            raise ConfigError(
                f"stage {stage.name}: {address} is a folder, which pods do not share",
                f"give s3:// addresses, or set kubernetes.data_claim and keep everything below {_DATA}",
            )
    environment = {**site.environment, **({"LATHE_INTERFACE": site.interface} if site.interface else {})}
    objects = manifests(
        KubernetesJob(
            name=_job(submission, stage),
            run=submission.record.name,
            stage=cast(Command, stage.command),
            image=site.container.image,
            run_file=runfile.dump(stage.config),
            nodes=stage.nodes if stage.command == "train" else stage.tasks,
            gpus=asked.gpus,
            environment=environment,
            kind=asked.kind if stage.command == "train" else "Job",
            **asked.model_dump(exclude={"gpus", "kind", "context"}),
        )
    )
    if stage.at_once < stage.tasks:
        objects[-1]["spec"]["parallelism"] = stage.at_once
    return objects


def model_warnings(pipeline: Pipeline, site: SiteConfig) -> list[str]:
    """Models that are folders of this machine: an image may have them too, or it may not."""
    return [
        f"stage {stage.name}: {name} is a folder or file of this machine\n"
        "  pods have it where their image does, at the same path; else give an s3:// address or a hub id"
        for stage in pipeline.stages
        if not stage.finalizes
        for name in local_models(stage.config)
        if not (_settings(stage, site).data_claim and name.startswith(_DATA))
    ]


def _settings(stage: Stage, site: SiteConfig) -> KubernetesConfig:
    of_command = site.kubernetes_by_command.get(stage.command, KubernetesConfig())  # type: ignore[call-overload]
    asked = site.kubernetes.with_changes(of_command)
    if stage.command == "train" or "gpus" in of_command.model_fields_set:
        return asked
    return asked.model_copy(update={"gpus": min(asked.gpus, 1 if stage.command == "encode" else 0)})


def _job(submission: Submission, stage: Stage) -> str:
    return f"{submission.record.name}-{stage.name}"


def _make(submission: Submission, stage: Stage, site: SiteConfig) -> None:
    record = submission.stage(stage.name)
    kind = _settings(stage, site).kind if stage.command == "train" else "Job"
    resource = f"{_RESOURCES[kind]}/{_job(submission, stage)}"
    if record.id:
        try:
            failed = state_of(submission, resource)[0] == "failed"
        except GoneError:
            failed = False
        if failed:  # a Job that has failed stays so
            ask(submission, "delete", resource, "--wait=true")
    file = _file(submission, record)
    try:
        file.write_text(_text(manifests_of(submission, stage, site)), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{file} cannot be written: {error.strerror}", "make room") from error
    record.id, record.nodes, record.commands = resource, stage.nodes, [["kubectl", "apply", "-f", str(file)]]
    submission.save()
    ask(submission, "apply", "-f", str(file))


def _wait(submission: Submission, stage: Stage) -> None:
    record = submission.stage(stage.name)
    told, heard = ("", ""), time.monotonic()
    while True:
        try:
            now, heard = state_of(submission, record.id), time.monotonic()
        except GoneError:
            raise
        except LatheError as error:  # an API server that is started anew ends no wait of days
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise
            now = "unknown", error.message
        if now[0] in ("finished", "failed"):
            break
        if now != told:
            tell(f"  {record.id}: {': '.join(filter(None, now))}")
            told = now
        time.sleep(POLL_SECONDS)
    if now[0] == "failed":
        logs = f"lathe launch logs {submission.shown} --stage {stage.name}"
        raise KubernetesError(f"stage {stage.name}: {record.id} has failed: {now[1]}", f"see {logs}")


def _text(objects: Sequence[dict[str, Any]]) -> str:
    texts = (yaml.dump(one, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True) for one in objects)
    return "---\n".join(texts)


class _Dumper(yaml.SafeDumper):
    """Text is text to other readers of YAML too."""


def _scalar(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _NO_TEXT_TO_OTHERS.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _scalar)
