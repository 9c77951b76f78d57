"""A real Prometheus, Alertmanager and Pushgateway beside a two-rank run and an encode job of two workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from encode_worker import FORK, run_worker
from latent_set import build, encode_settings, save_autoencoder, write_pictures
from monitoring import (
    INFRA,
    Alertmanager,
    Prometheus,
    Pushgateway,
    Webhook,
    fetch,
    quick_configuration,
    quick_rules,
    tool,
    wait_until,
)
from training_run import Run, ranks_of

from pipeline.config import MetricsConfig
from pipeline.data.manifest import RECEIPT_SUFFIX, load_receipt
from pipeline.metrics import DEFINITIONS, Metrics, Place, read_log
from pipeline.metrics.table import flat
from pipeline.storage import counters, open_store

pytestmark = [pytest.mark.prometheus, pytest.mark.ranks, pytest.mark.s3]

COPIES = 6
"""How often the encode job has each picture, so that it lasts for several scrapes."""
STALLED_SECONDS = 5
TRAINING = {
    "metrics.run": "pair",
    "metrics.peak_flops": 1e12,
    "objective.kind": "ddpm",  # it has a variational bound
    "objective.prediction": "epsilon",
    "engine.precision": "float16",  # and this a loss scale
    "engine.zero_stage": 0,
    "validation.every": 5,
    "validation.samples": 8,
    "validation.noise_levels": 2,
    "steps": 1_000_000,
}
GPU = ("device_memory_bytes", "device_memory_peak_bytes")
"""What only GPUs have: told by a stand-in, through the real exporter."""


@dataclass
class Cluster:
    """All that is at work."""

    folder: Path
    prometheus: Prometheus
    pushgateway: Pushgateway
    webhook: Webhook
    run: Run
    train: Any = None
    latents: str = ""
    workers: list[Any] = field(default_factory=list)
    pushed: dict[str, float] = field(default_factory=dict)

    @property
    def discovery(self) -> Path:
        return self.folder / "discovery"

    def ranks(self) -> list[psutil.Process]:
        return sorted(ranks_of(self.train), key=lambda process: int(process.environ()["RANK"]))

    def firing(self, alert: str) -> list[dict[str, Any]]:
        return self.prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing", run="pair"}}')


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3_server) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    write_pictures(folder / "images")
    save_autoencoder(folder / "vae")
    with ExitStack() as stack:
        webhook = stack.enter_context(Webhook())
        alertmanager = stack.enter_context(Alertmanager(folder / "alertmanager", webhook.url))
        pushgateway = stack.enter_context(Pushgateway(folder / "pushgateway"))
        configuration = quick_configuration(
            discovery=folder / "discovery",
            alertmanager=alertmanager.address,
            pushgateway=pushgateway.address,
            rules=quick_rules(folder / "rules", {"stall_seconds": STALLED_SECONDS}),
        )
        prometheus = stack.enter_context(Prometheus(folder / "prometheus", configuration))
        run = Run(folder / "training", build(folder))
        found = Cluster(folder, prometheus, pushgateway, webhook, run)
        overrides = {**TRAINING, "metrics.discovery": found.discovery}
        found.train = run.start(*(f"{name}={value}" for name, value in overrides.items()))
        stack.callback(end, found.train)
        start_workers(found, f"{s3_server.url}/monitored")
        stack.callback(lambda: [worker.kill() for worker in found.workers])
        stand_in(found, stack)
        run.wait_for_step(12, found.train)
        for worker in found.workers:
            worker.join(120)
            assert worker.exitcode == 0
        yield found


def start_workers(cluster: Cluster, output: str) -> None:
    """Two workers of an encode job on S3: Prometheus finds the first, the second pushes."""
    for path in sorted((cluster.folder / "images").glob("*.tar")):
        for copy in range(1, COPIES):
            shutil.copy(path, path.with_name(f"{copy}{path.name}"))
    cluster.latents = f"{output}/latents"
    settings = encode_settings(cluster.folder, Path("elsewhere")).model_dump(mode="json")
    ways = {"discovery": str(cluster.discovery)}, {"pushgateway": cluster.pushgateway.url}
    for number, way in enumerate(ways):
        metrics = {"run": "latents", "prometheus": number == 0, "pushgateway_linger_seconds": 3, **way}
        config = type(encode_settings(cluster.folder, Path("x"))).model_validate(
            {**settings, "output": cluster.latents, "metrics": metrics}
        )
        worker = FORK.Process(target=run_worker, args=(config, (number, len(ways)), dict(os.environ)), daemon=True)
        worker.start()
        cluster.workers.append(worker)


def stand_in(cluster: Cluster, stack: ExitStack) -> None:
    """A rank that has a GPU, and a first stage, by the real exporter."""
    for run, job in (("gpu", "train"), ("vae", "first_stage")):
        config = MetricsConfig(run=run, discovery=str(cluster.discovery))
        metrics = stack.enter_context(Metrics(config, job, Place(f"/runs/{run}"), traffic=counters))
        for definition in DEFINITIONS:
            if job in definition.jobs and (job == "first_stage" or definition.key in GPU):
                metrics.set(definition.key, 1.0, **dict.fromkeys(definition.labels, "x"))


def end(child: Any) -> None:
    """The launcher and its ranks, also if one is stopped."""
    for process in [*psutil.Process(child.pid).children(recursive=True), child] if child.poll() is None else []:
        process.kill()
    child.communicate(timeout=30)


def panels() -> list[Any]:
    found = []
    for path in sorted((INFRA / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found.append(pytest.param(path.stem, target["expr"], id=f"{path.stem}-{panel['id']}{target['refId']}"))
    return found


@pytest.mark.parametrize(("dashboard", "expr"), panels())
def test_every_panel_finds_data(cluster, dashboard, expr):
    run = {"lathe-train": "pair", "lathe-first-stage": "vae", "lathe-encode": "latents"}[dashboard]
    if any(f"_{key}{{" in expr for key in GPU):
        run = "gpu"
    asked = expr.replace("$run", run).replace("$__rate_interval", "5s")
    now = time.time()
    found = cluster.prometheus.ask("query_range", query=asked, start=now - 120, end=now, step=1)["result"]
    values = [float(value) for series in found for _, value in series["values"]]
    assert any(value == value for value in values), asked


def test_values_are_those_of_the_log_within_a_scrape(cluster):
    log = {line["step"]: line for line in read_log(cluster.run.store) if "loss" in line}
    selector = '{run="pair", rank="0"}'
    (steps,) = cluster.prometheus.query(f"lathe_train_step{selector}[1m]")
    scraped = {at: int(float(value)) for at, value in steps["values"]}
    compared = 0
    for key, value in log[12].items():
        if key in ("step", "time"):
            continue
        for labels, _ in flat(value):
            definition = next(d for d in DEFINITIONS if d.key == key and "train" in d.jobs)
            chosen = "".join(f', {n}="{v}"' for n, v in zip(definition.labels, labels, strict=True))
            (series,) = cluster.prometheus.query(f"lathe_train_{key}{selector[:-1]}{chosen}}}[1m]")
            for at, told in series["values"]:
                # what is scraped in the midst of a report has some values of the next line
                lines = [log[step] for step in (scraped[at], scraped[at] + 1) if step in log]
                assert any(same(line.get(key), labels, float(told)) for line in lines), (key, labels, at, told)
                compared += 1
    assert compared > 50
    for at, step in scraped.items():
        if step in log and step + 1 in log:
            assert log[step]["time"] <= at + 1.1
            assert log[step + 1]["time"] >= at - 1.1


def same(logged: Any, labels: tuple[str, ...], told: float) -> bool:
    for label in labels:
        logged = logged[label] if logged is not None else None
    return told != told if logged is None else told == pytest.approx(logged, rel=1e-8)


def test_counts_that_a_worker_has_pushed_are_those_of_its_receipts_and_go_with_it(cluster):
    sources = sorted(path.name for path in (cluster.folder / "images").iterdir())
    store = open_store(f"{cluster.latents}/32")
    receipts = [load_receipt(store, name + RECEIPT_SUFFIX) for name in sources[1::2]]
    assert told(cluster, "images") == {"": sum(receipt.samples() for receipt in receipts)}
    assert told(cluster, "rejects") == Counter(reject.reason for receipt in receipts for reject in receipt.rejects)
    assert told(cluster, "finished") == {"": 1}
    assert 'run="latents"' not in fetch(f"{cluster.pushgateway.url}/metrics")
    assert not list(cluster.discovery.glob("lathe-encode-*"))
    assert cluster.prometheus.query('up{lathe_job="encode"}') == []


def told(cluster: Cluster, key: str) -> dict[str, float]:
    """What the second worker pushed last, by reason where there are reasons."""
    definition = next(d for d in DEFINITIONS if d.key == key and "encode" in d.jobs)
    name = definition.name("encode")
    found = cluster.prometheus.query(f'last_over_time({name}{{run="latents", worker="1"}}[5m])')
    return {series["metric"].get("reason", ""): float(series["value"][1]) for series in found}


def test_promtool_lints_what_is_scraped(cluster):
    targets = cluster.prometheus.ask("targets", state="active")["activeTargets"]
    urls = [target["scrapeUrl"] for target in targets if target["labels"]["job"] == "lathe"]
    assert len(urls) == 4
    for url in urls:
        done = tool("promtool", "check", "metrics", given=fetch(url))
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_rule_fails(cluster):
    groups = cluster.prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 30
    assert {rule["health"] for rule in rules} == {"ok"}


def test_a_trainer_that_is_stopped_wakes_somebody_and_one_that_goes_on_again_does_not(cluster):
    wait_until(lambda: not cluster.firing("LatheTrainerStalled"), what="the run to be at work")
    cluster.webhook.notices.clear()
    rank = cluster.ranks()[1]
    rank.send_signal(signal.SIGSTOP)
    (to, alert), *_ = wait_until(lambda: cluster.webhook.told("LatheTrainerStalled"), what="the alert")
    assert to == "night"
    assert alert["labels"]["run"] == "pair"
    assert re.fullmatch(r"pair: no step for [0-9.]+s", alert["annotations"]["summary"])
    assert alert["annotations"]["runbook_url"] == "docs/runbooks.md#lathetrainerstalled"
    wait_until(lambda: cluster.firing("LatheRankMissing"), what="the rank to be missed")
    rank.send_signal(signal.SIGCONT)
    wait_until(lambda: cluster.webhook.told("LatheTrainerStalled", "resolved"), what="the alert to be resolved")


def test_a_run_that_is_killed_wakes_somebody(cluster):
    assert not cluster.webhook.told("LatheRunDown")
    for rank in cluster.ranks():
        rank.kill()
    (to, alert), *_ = wait_until(lambda: cluster.webhook.told("LatheRunDown"), what="the alert")
    assert to == "night"
    assert alert["labels"]["run"] == "pair"
