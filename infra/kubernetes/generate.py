"""Write the Kustomize base and what overlays take from code: `python -m infra.kubernetes.generate [FOLDER]`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.operate.launch.kubernetes import manifests
from pipeline.operate.launch.kubernetes_job import Kind, KubernetesJob, Stage

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PROMETHEUS = FOLDER.parent / "prometheus"
_SELECTOR = {"app.kubernetes.io/name": "lathe"}
_IN_GPU = {
    "encode": {"nodes": 8, "gpus": 1, "cpus": 8, "memory": "32Gi", "cache_size": "100Gi"},
    "train": {"nodes": 2, "gpus": 8, "cpus": 64, "memory": "512Gi", "cache_size": "500Gi"},
    "export": {"cpus": 8, "memory": "32Gi"},
}
_IN_BASE = {"encode": {"nodes": 4}, "train": {"nodes": 2}, "export": {}}


def main(arguments: Sequence[str]) -> int:
    """Write every file to the folder given, or to where they are kept."""
    folder = Path(arguments[0]) if arguments else FOLDER
    for name, objects in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=140)
        path.write_text(f"# Written by python -m infra.kubernetes.generate\n---\n{text}", encoding="utf-8")
    return 0


def files() -> dict[str, list[dict[str, Any]]]:
    """The objects of each file, by its path below the folder."""
    stages: tuple[Stage, ...] = ("encode", "train", "export")
    made = {f"base/{stage}.yaml": manifests(_job(stage, _IN_BASE)) for stage in stages}
    # Of these objects each is a patch of the base's: they have all of its fields.
    made |= {f"overlays/gpu/{stage}.yaml": manifests(_job(stage, _IN_GPU))[1:] for stage in stages}
    made["overlays/jobset/train.yaml"] = manifests(_job("train", _IN_GPU, "JobSet"))[1:]
    made["overlays/pytorchjob/train.yaml"] = manifests(_job("train", _IN_GPU, "PyTorchJob"))[1:]
    made["overlays/monitoring/pod-monitor.yaml"] = [_pod_monitor()]
    made["overlays/monitoring/rules.yaml"] = [_rules(path) for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    return made


def _job(stage: Stage, sizes: dict[str, dict[str, Any]], kind: Kind = "Job") -> KubernetesJob:
    """A stage with the demo's run file, all in the bucket, and where the roles of infra/terraform reach; what needs
    another's result waits until it is let begin.
    """
    text = (ROOT / "configs/demo" / f"{stage}.yaml").read_text(encoding="utf-8")
    run_file = re.sub("(?m)^(output): lathe-demo/", r"\1: ${root}/run/", text)
    return KubernetesJob(
        name=f"lathe-{stage}",
        stage=stage,
        kind=kind,
        image="lathe",
        run_file=run_file,
        service_account=f"lathe-{stage}",
        suspended=stage != "encode",
        **sizes[stage],
    )


def _pod_monitor() -> dict[str, Any]:
    """infra/prometheus/kubernetes.yml for the Prometheus operator, from that file."""
    tree = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text(encoding="utf-8"))
    (scrape,) = (one for one in tree["scrape_configs"] if one["job_name"] == "lathe")
    relabelings = [{_camel(key): value for key, value in step.items()} for step in scrape["relabel_configs"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "lathe", "labels": _SELECTOR},
        "spec": {
            "selector": {"matchLabels": _SELECTOR},
            "podMetricsEndpoints": [{"path": "/metrics", "interval": "15s", "relabelings": relabelings}],
        },
    }


def _rules(path: Path) -> dict[str, Any]:
    """A file of rules for the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": f"lathe-{path.stem}", "labels": _SELECTOR},
        "spec": yaml.safe_load(path.read_text(encoding="utf-8")),
    }


def _camel(name: str) -> str:
    return re.sub("_(.)", lambda match: match[1].upper(), name)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, and sequences below their key, as people write them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
