"""Prometheus's and Alertmanager's files: valid, in step with the metric table, each alert tested and explained."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring import INFRA, RULES, Prometheus, tool, wait_until

from pipeline.metrics import DEFINITIONS
from pipeline.storage import counters
from pipeline.storage.traffic import ERROR_KINDS

RUNBOOKS = Path(__file__).parents[2] / "docs/runbooks.md"
CASES = sorted((Path(__file__).parent / "rules").glob("*.yml"))
CONFIGURATIONS = INFRA / "prometheus"
NOT_METRICS = {"lathe_job"}


def rules() -> list[dict[str, Any]]:
    trees = [yaml.safe_load(path.read_text()) for path in sorted(RULES.glob("*.yml"))]
    return [rule for tree in trees for group in tree["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"]: rule for rule in rules() if "record" in rule}


@cache
def expectations() -> dict[str, set[bool]]:
    """Whether alerts fire in their cases."""
    found = defaultdict(set)
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                found[check["alertname"]].add(bool(check["exp_alerts"]))
    return found


def test_rules_ask_for_what_the_table_has():
    known = {name for d in DEFINITIONS for subject in d.jobs for name in d.series(subject)}
    for rule in rules():
        expr = rule["expr"]
        for pattern in re.findall(r'__name__=~"([^"]+)"', expr):
            assert [name for name in known if re.fullmatch(pattern, name)], expr
        for name in re.findall(r"[\w:]*\blathe[\w:]*", re.sub(r'"[^"]*"', "", expr)):
            if name not in NOT_METRICS:
                assert name in (RECORDED if ":" in name else known), f"{name}: asked for in vain by {rule['expr']}"


def test_every_threshold_is_compared_with():
    thresholds = [name for name in RECORDED if name.endswith(":threshold")]
    for name in thresholds:
        assert any(f"scalar({name})" in alert["expr"] for alert in ALERTS.values()), name
    compared = [re.findall(r"scalar\(([^)]+)\)", alert["expr"]) for alert in ALERTS.values()]
    assert {name for names in compared for name in names} == set(thresholds)


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_what_is_wrong_and_where_the_remedy_is(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert "{{ $labels.run }}" in alert["annotations"]["summary"]
    page, anchor = alert["annotations"]["runbook_url"].split("#")
    assert page == "docs/runbooks.md"
    headings = re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_runbooks_explain_alerts_that_there_are():
    text = RUNBOOKS.read_text()
    assert set(re.findall(r"^### (Lathe\w+)$", text, flags=re.MULTILINE)) == set(ALERTS)
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert {"**Means:**", "**Look:**", "**Do:**"} <= set(re.findall(r"\*\*\w+:\*\*", section)), section
    for name in re.findall(r"\blathe_[a-z_]+", text):
        assert any(series.startswith(name) for d in DEFINITIONS for s in d.jobs for series in d.series(s)) or (
            name in NOT_METRICS
        ), name


def test_the_runbook_explains_every_kind_of_error():
    section = RUNBOOKS.read_text().partition("### LatheStorageErrors")[2].partition("###")[0]
    kinds = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]
    assert {kind for line in kinds for kind in line} - {"kind"} == set(ERROR_KINDS)
    assert set(counters()["errors"]) == set(ERROR_KINDS)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_cases_that_fire_and_that_do_not(name):
    assert expectations()[name] == {True, False}


def test_alerts_that_inhibit_others_are_ours():
    tree = yaml.safe_load((INFRA / "alertmanager/alertmanager.yml").read_text())
    for rule in tree["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            pattern = re.search(r'"(.+)"', matcher)[1]
            assert any(re.fullmatch(pattern, name) for name in ALERTS)
            for name in re.findall(r"\w+", pattern.partition("(")[2]):
                assert f"Lathe{name}" in ALERTS


@pytest.mark.prometheus
class TestTools:
    def test_promtool_finds_the_rules_valid(self):
        done = tool("promtool", "check", "rules", *sorted(RULES.glob("*.yml")))
        assert done.returncode == 0, done.stdout + done.stderr

    def test_alerts_fire_and_do_not_as_the_cases_say(self):
        done = tool("promtool", "test", "rules", *CASES)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("SUCCESS") == len(CASES)

    def test_cases_can_fail(self, tmp_path):
        path = next(path for path in CASES if path.stem == "storage")
        text = path.read_text().replace("../../../infra", str(INFRA))
        (tmp_path / "same.yml").write_text(text)
        (tmp_path / "other.yml").write_text(text.replace("0+20x60", "0+1x60"))
        assert tool("promtool", "test", "rules", tmp_path / "same.yml").returncode == 0
        assert tool("promtool", "test", "rules", tmp_path / "other.yml").returncode == 1

    @pytest.mark.parametrize("name", ["static", "file-sd"])
    def test_promtool_finds_configurations_valid(self, name):
        done = tool("promtool", "check", "config", CONFIGURATIONS / f"{name}.yml")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "FAILED" not in done.stdout + done.stderr

    def test_alertmanager_finds_its_configuration_valid_and_wakes_for_what_is_critical(self):
        file = INFRA / "alertmanager/alertmanager.yml"
        done = tool("amtool", "check-config", file)
        assert done.returncode == 0, done.stdout + done.stderr
        receivers = {
            severity: tool("amtool", "config", "routes", "test", f"--config.file={file}", f"severity={severity}")
            for severity in ("critical", "warning")
        }
        assert {severity: done.stdout.strip() for severity, done in receivers.items()} == {
            "critical": "night",
            "warning": "day",
        }

    def test_pods_become_targets_with_our_labels(self, tmp_path):
        """By a Prometheus that is told of pods as Kubernetes would, since Debian's is built without its discovery."""
        tree = yaml.safe_load((CONFIGURATIONS / "kubernetes.yml").read_text())
        scraped, pushed = tree["scrape_configs"]
        for config in (scraped, pushed, *tree["alerting"]["alertmanagers"]):
            (discovery,) = config.pop("kubernetes_sd_configs")
            assert discovery["role"] in ("pod", "service")
        scraped["static_configs"] = [{"targets": [f"10.0.0.1:{9400 + i}"], "labels": pod} for i, pod in enumerate(PODS)]
        tree["alerting"]["alertmanagers"] = []
        tree["rule_files"] = [f"{RULES}/*.yml"]
        with Prometheus(tmp_path / "prometheus", tree) as prometheus:
            found = wait_until(lambda: prometheus.ask("targets", state="active")["activeTargets"])
        labels = {target["scrapeUrl"]: target["labels"] for target in found}
        assert [labels.get(f"http://10.0.0.1:{9400 + i}/metrics") for i in range(len(PODS))] == TARGETS


def pod(job: str, index: str, port: str, phase: str = "Running") -> dict[str, str]:
    about = {
        "label_lathe_job": job,
        "label_lathe_run": "sd15",
        "annotation_batch_kubernetes_io_job_completion_index": index,
        "container_port_name": port,
        "phase": phase,
        "node_name": "node-7",
        "name": f"sd15-{index}",
    }
    return {f"__meta_kubernetes_pod_{name}": value for name, value in about.items()}


def target(job: str, index: str, **number: str) -> dict[str, str]:
    name = f"sd15-{index}"
    instance = number.pop("instance")
    common = {"job": "lathe", "lathe_job": job, "run": "sd15", "host": "node-7", "pod": name}
    return {**common, "instance": f"10.0.0.1:{instance}", **number}


PODS = [
    pod("train", "3", "metrics"),
    pod("train", "3", "metrics-1"),
    pod("train", "3", "http"),
    pod("encode", "12", "metrics"),
    pod("encode", "4", "metrics", phase="Succeeded"),
]
TARGETS = [
    target("train", "3", instance="9400", rank="3"),
    target("train", "3", instance="9401", rank="3.1"),
    None,
    target("encode", "12", instance="9403", worker="12"),
    None,
]
