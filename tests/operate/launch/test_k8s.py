"""`lathe launch k8s`, with a program in the place of kubectl that keeps objects in a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import runfile
from pipeline.config import SiteConfig
from pipeline.errors import ConfigError, SetupError
from pipeline.operate.launch import k8s, submissions
from pipeline.operate.launch.cancelling import cancel
from pipeline.operate.launch.reading import read
from pipeline.operate.launch.sequence import is_under_way
from pipeline.operate.launch.stages import Pipeline, read_pipeline
from pipeline.operate.launch.states import states

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[3]
KUBECTL = '''#!{python}
"""Keeps what is applied in a file; a Job ends as `verdicts` says of it, once it has been asked about twice."""
import json, os, sys, yaml
from pathlib import Path

folder = Path(os.environ["CLUSTER"])
jobs = json.loads((folder / "jobs").read_text())
verdicts = json.loads((folder / "verdicts").read_text())
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
arguments = [one for one in sys.argv[1:] if not one.startswith("-")]
verb = arguments[-2] if arguments[-2] in ("get", "delete") else "logs" if "logs" in arguments else "apply"
name = arguments[-1].partition("/")[2]
if "-f" in sys.argv:
    for one in yaml.safe_load_all(Path(arguments[-1]).read_text()):
        name = one["metadata"]["name"] + ("" if "Job" in one["kind"] else "." + one["kind"])
        if verb == "apply":
            jobs.setdefault(name, {{"asked": 0}})
        else:
            jobs.pop(name, None)
elif verb == "logs":
    print("what the pods say")
elif name not in jobs:
    sys.exit(f'Error from server (NotFound): jobs.batch "{{name}}" not found')
elif verb == "delete":
    del jobs[name]
else:
    jobs[name]["asked"] += 1
    status = {{"active": 2}}
    if jobs[name]["asked"] > 2:
        told = next((ends for stage, ends in verdicts.items() if name.endswith(stage)), "Complete")
        verdict = jobs[name].get("verdict") or told
        jobs[name]["verdict"] = verdict
        status = {{"conditions": [{{"type": verdict, "status": "True", "message": "too many failed pods"}}]}}
    if "away" in verdicts:
        verdicts.pop("away")
        (folder / "verdicts").write_text(json.dumps(verdicts))
        sys.exit("The connection to the server 10.0.0.1:6443 was refused")
    print(json.dumps({{"status": status}}))
(folder / "jobs").write_text(json.dumps(jobs))
'''
SITE: dict[str, Any] = {
    "container": {"image": "registry/lathe:1"},
    "environment": {"NCCL_DEBUG": "INFO"},
    "interface": "eth0",
    "kubernetes": {"gpus": 8, "namespace": "ml", "context": "prod", "secrets": ["s3"]},
    "kubernetes_by_command": {"export": {"memory": "8Gi"}},
}
STAGES = ("encode", "encode-finalize", "train", "export")


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "jobs").write_text("{}")
        self.end()

    def end(self, **verdicts: str) -> None:
        (self.folder / "verdicts").write_text(json.dumps(verdicts))

    def calls(self, verb: str) -> list[list[str]]:
        if not (self.folder / "calls").exists():
            return []
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in calls if verb in call]

    def objects(self) -> list[str]:
        return list(json.loads((self.folder / "jobs").read_text()))

    def jobs(self) -> list[str]:
        return [name for name in self.objects() if "." not in name]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setenv("CLUSTER", str(tmp_path / "cluster"))
    monkeypatch.setattr(k8s, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path / "cluster")


def pipeline(*overrides: str) -> Pipeline:
    files = [f"configs/demo/{job}.yaml" for job in ("encode", "train", "export")]
    arguments = [*files, "root=s3://b/run", "export.output=s3://b/export", *overrides]
    return read_pipeline(arguments, tasks=6, at_once=4, nodes=2).with_finalizers()


def site(**fields: Any) -> SiteConfig:
    return SiteConfig.model_validate({**SITE, **fields})


def test_what_is_made_of_each_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    text = k8s.dry_run(pipeline("train.seed=5"), site(), None, tmp_path)
    objects = [one for one in yaml.safe_load_all(text) if one]
    jobs = {one["metadata"]["name"].split("-", 3)[3]: one for one in objects if one["kind"] == "Job"}
    assert list(jobs) == list(STAGES)
    sizes = {name: (one["spec"]["completions"], one["spec"]["parallelism"]) for name, one in jobs.items()}
    assert sizes == {"encode": (6, 4), "encode-finalize": (1, 1), "train": (2, 2), "export": (1, 1)}
    gpus = {}
    for name, one in jobs.items():
        (container,) = one["spec"]["template"]["spec"]["containers"]
        gpus[name] = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert container["image"] == "registry/lathe:1"
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
        assert {"name": "LATHE_INTERFACE", "value": "eth0"} in container["env"]
        assert container["resources"]["limits"]["memory"] == ("8Gi" if name == "export" else "16Gi")
        assert one["metadata"]["namespace"] == "ml"
    assert gpus == {"encode": 1, "encode-finalize": 1, "train": 8, "export": 0}
    maps = {one["metadata"]["name"]: one["data"]["run.yaml"] for one in objects if one["kind"] == "ConfigMap"}
    (train,) = (text for name, text in maps.items() if name.endswith("-train"))
    assert yaml.safe_load(train)["seed"] == 5
    assert "Service" in [one["kind"] for one in objects]
    assert not (tmp_path / "lathe-launches").exists()


@pytest.mark.parametrize(
    ("arguments", "fields", "said"),
    [
        (["train.init_from.run=base"], {}, "stage train: base is a folder, which pods do not share"),
        (["export.output=there"], {}, "stage export: there is a folder, which pods do not share"),
        (["root=/data/x"], {}, "stage encode: /data/x/images is a folder, which pods do not share"),
        (["root=/else"], {"kubernetes": {"data_claim": "c"}}, "stage encode: /else/images is a folder"),
        ([], {"container": None}, "container: missing; Kubernetes needs an image"),
        (["configs/demo/sample.yaml"], {}, "stage sample: lathe sample is not run on Kubernetes"),
    ],
)
def test_what_pods_cannot_do_is_told_before_anything_is_made(cluster, tmp_path, arguments, fields, said):
    with pytest.raises(ConfigError) as caught:
        k8s.launch(pipeline(*arguments), site(**fields), None, tmp_path, waits=True)
    assert said in caught.value.message
    assert not cluster.calls("apply")
    assert not (tmp_path / "lathe-launches").exists()


def test_models_that_are_folders_here_are_told(tmp_path, monkeypatch):
    """An image may have them too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tower").mkdir()
    towers = "[{name: a, model: tower}, {name: b, model: ViT-L-14, pretrained: openai}]"
    text = [f"{stage}.text={{mode: cached, towers: {towers}}}" for stage in ("encode", "train")]
    stages = pipeline("train.unet.pretrained=/models/unet", "encode.autoencoder=owner/name", *text)
    warnings = [line.partition(" is ")[0] for line in k8s.model_warnings(stages, site())]
    assert warnings == ["stage encode: tower", "stage train: tower", "stage train: /models/unet"]
    below = pipeline("train.unet.pretrained=/data/unet")
    assert len(k8s.model_warnings(below, site())) == 1
    assert k8s.model_warnings(below, site(kubernetes={"data_claim": "c"})) == []


def test_folders_below_the_claim_are_shared(tmp_path):
    claimed = site(kubernetes={"data_claim": "runs"})
    text = k8s.dry_run(pipeline("root=/data/x", "export.output=/data/y"), claimed, None, tmp_path)
    assert text.count("claimName: runs") == 4


def test_stages_are_made_one_after_the_other_and_go_on_after_a_failure(cluster, tmp_path, capsys):
    cluster.end(train="Failed")
    with pytest.raises(k8s.KubernetesError, match=r"stage train: job.batch/\S+-train has failed: too many failed pods"):
        k8s.launch(pipeline(), site(), None, tmp_path, waits=True)
    assert [name.split("-", 3)[3] for name in cluster.jobs()] == list(STAGES[:3])
    assert "encode: waiting" not in capsys.readouterr().err
    failed = submissions.find(None)
    assert [one.state for one in states(failed)] == ["finished", "finished", "failed", "waiting"]

    cluster.end()
    before = len(cluster.calls("apply"))
    done = k8s.launch(pipeline(), site(), None, tmp_path, waits=True)
    assert done.folder == failed.folder
    assert len(cluster.calls("apply")) - before == 2
    assert cluster.calls("delete")[0][-2:] == [done.stage("train").id, "--wait=true"]
    assert [one.state for one in states(done)] == ["finished"] * 4
    for call in cluster.calls("apply") + cluster.calls("get"):
        assert call[:4] == ["--context", "prod", "--namespace", "ml"]
    run_file = runfile.load_any(str(done.folder / "train.yaml"))
    applied = list(yaml.safe_load_all((done.folder / "train.kubernetes.yaml").read_text()))
    assert yaml.safe_load(applied[0]["data"]["run.yaml"]) == run_file.model_dump(mode="json")


def test_a_cluster_that_is_away_for_a_moment_ends_no_wait(cluster, tmp_path, capsys, monkeypatch):
    alone = read_pipeline(["configs/demo/train.yaml", "root=s3://b/x"])
    cluster.end(away="once")
    done = k8s.launch(alone, site(), None, tmp_path, waits=True)
    assert done.stage("train").exit_code == 0
    assert "-train: unknown: the cluster does not answer" in capsys.readouterr().err
    cluster.end(away="once")
    monkeypatch.setattr(k8s, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(k8s.KubernetesError, match="the cluster does not answer"):
        k8s.launch(alone, site(), None, tmp_path, waits=True)


def test_text_that_other_readers_of_yaml_take_for_something_else_is_quoted(tmp_path):
    odd = {"A": "y", "B": "1e3", "C": "0o17", "D": "12:30:00", "E": "-1_000.5", "F": "N", "G": "+.inf", "H": "plain"}
    text = k8s.dry_run(pipeline(), site(environment=odd), None, tmp_path)
    for name, value in odd.items():
        (written,) = set(re.findall(rf"- name: {name}\n +value: (.*)\n", text))
        assert written in (f'"{value}"', f"'{value}'") or name == "H"
    for job in yaml.safe_load_all(text):
        if job["kind"] == "Job":
            (container,) = job["spec"]["template"]["spec"]["containers"]
            told = {one["name"]: one["value"] for one in container["env"] if "value" in one}
            assert {name: told[name] for name in odd} == odd


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"active": 2, "ready": 0}, ("waiting", "2 active")),
        ({"active": 2, "ready": 1, "failed": 1}, ("running", "2 active, 1 ready, 1 failed")),
        ({"replicatedJobsStatus": [{"name": "node", "active": 1, "ready": 1}]}, ("running", "1 active, 1 ready")),
        ({"conditions": [{"type": "Running", "status": "True"}]}, ("running", "")),
        ({}, ("waiting", "")),
    ],
)
def test_pods_that_have_no_place_yet_do_not_run(tmp_path, monkeypatch, status, told):
    submission = submissions.plan(pipeline(), "k8s", None, tmp_path)
    monkeypatch.setattr(k8s, "ask", lambda *_, **__: json.dumps({"status": status}))
    assert k8s.state_of(submission, "job.batch/x") == told


def test_a_job_that_has_ended_long_ago_was_not_cancelled(cluster, tmp_path):
    alone = read_pipeline(["configs/demo/train.yaml", "root=s3://b/x"])
    submission = k8s.launch(alone, site(), None, tmp_path, waits=False)
    (cluster.folder / "jobs").write_text("{}")
    assert states(submission)[0].state == "cancelled"
    submission.record.stages[0].started -= timedelta(days=8)
    assert states(submission)[0].state == "forgotten"


WAITING = """
from pathlib import Path
from pipeline.config import SiteConfig
from pipeline.operate.launch import k8s
from pipeline.operate.launch.stages import read_pipeline

site = SiteConfig.model_validate({"container": {"image": "x"}})
pipeline = read_pipeline(["configs/demo/encode.yaml", "configs/demo/train.yaml", "root=s3://b/x"])
k8s.POLL_SECONDS = 100.0
k8s.launch(pipeline, site, None, Path.cwd(), waits=True)
"""


def test_a_launch_that_waits_leaves_a_record_of_its_end(cluster, tmp_path):
    """Machines that cannot see its process would take it for one that goes on."""
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert any("job.batch" in line for line in child.stderr)
    submission = submissions.find(None)
    assert cancel(submission, None) == ["encode", "train"]
    child.wait(20)
    assert cluster.objects() == []
    after = submissions.find(None)
    assert after.record.stages[0].ended is not None
    after.record.machine = "elsewhere"
    assert not is_under_way(after)


def test_one_stage_is_not_waited_for_and_is_begun_anew_once_it_has_finished(cluster, tmp_path):
    def launch() -> submissions.Submission:
        alone = read_pipeline(["configs/demo/train.yaml", "root=s3://b/x"])
        return k8s.launch(alone, site(), None, tmp_path, waits=False)

    first = launch()
    assert states(first)[0].state == "running"
    assert states(first)[0].said == "2 active"
    states(first)
    assert states(first)[0].state == "finished"
    assert launch().folder != first.folder


def test_pods_logs_and_the_end_of_what_runs(cluster, tmp_path, capfd):
    alone = read_pipeline(["configs/demo/train.yaml", "root=s3://b/x"], nodes=2)
    submission = k8s.launch(alone, site(), None, tmp_path, waits=False)
    read(submission, None, None, 7, follow=True)
    assert capfd.readouterr().out == "what the pods say\n"
    (call,) = cluster.calls("logs")
    assert f"app.kubernetes.io/instance={submission.name}-train" in call
    assert {"--follow", "--tail=7", "--prefix"} <= set(call)
    read(submission, None, 1, 7, follow=False)
    wanted = f"app.kubernetes.io/instance={submission.name}-train,batch.kubernetes.io/job-completion-index=1"
    assert wanted in cluster.calls("logs")[-1]
    with pytest.raises(ConfigError, match="--task 2: stage train has 2"):
        read(submission, None, 2, 7, follow=False)
    assert len(cluster.objects()) == 3  # the Job, its run file, its Service
    assert cancel(submission, None) == ["train"]
    assert cluster.objects() == []
    assert states(submission)[0].state == "cancelled"


def test_a_cluster_that_does_not_answer_and_no_kubectl(cluster, tmp_path, monkeypatch):
    (tmp_path / "bin/kubectl").write_text(
        f"#!{sys.executable}\nimport sys; sys.exit('The connection to the server 10.0.0.1:6443 was refused - check')\n"
    )
    with pytest.raises(k8s.KubernetesError, match="the cluster does not answer: The connection to the server"):
        k8s.launch(pipeline(), site(), None, tmp_path, waits=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="kubectl is not on the PATH"):
        k8s.launch(pipeline(), site(), None, tmp_path, waits=True)
