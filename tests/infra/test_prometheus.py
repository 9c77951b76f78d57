"""A real Prometheus, Alertmanager and Pushgateway beside a two-rank run and two encode jobs, one of which pushes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest
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

from pipeline.config import EncodeConfig, MetricsConfig
from pipeline.data.manifest import RECEIPT_SUFFIX, load_receipt
from pipeline.encode.job import encode
from pipeline.metrics import DEFINITIONS, Metrics, Place, read_log
from pipeline.metrics.table import flat
from pipeline.storage import counters, open_store

pytestmark = [pytest.mark.prometheus, pytest.mark.ranks, pytest.mark.s3]

COPIES = 300
"""How often one encode job has each picture, so that it is at work as long as it is looked at."""
SCRAPES = 8
"""Of each process, before anything is looked at: rates need some."""
STALLED_SECONDS = 5
TRAINING = {
    "objective": {"kind": "ddpm"},  # it has a variational bound
    "validation": {"every": 5, "samples": 8, "noise_levels": 2},
    "steps": 1_000_000,
}
FLOAT16 = ("engine.precision=float16", "engine.zero_stage=0")
"""Float16 has a loss scale."""
GPU = ("device_memory_bytes", "device_memory_peak_bytes")
"""What only GPUs have: told by a stand-in, through the real exporter."""

ODD = 'odd "}\n# HELP \\ {x="'
"""A run's name, and what data may bring as a label's value."""


@dataclass
class Cluster:
    """All that is at work."""

    folder: Path
    prometheus: Prometheus
    pushgateway: Pushgateway
    webhook: Webhook
    run: Run
    train: Any = None
    encode: Any = None
    said: list[str] = field(default_factory=list)

    @property
    def discovery(self) -> Path:
        return self.folder / "discovery"

    def ranks(self) -> list[psutil.Process]:
        return sorted(ranks_of(self.train), key=lambda process: int(process.environ()["RANK"]))

    def firing(self, alert: str) -> list[dict[str, Any]]:
        return self.prometheus.query(f'ALERTS{{alertname="{alert}", alertstate="firing", run="pair"}}')

    def notice(self, alert: str, run: str, status: str = "firing") -> tuple[str, dict[str, Any]]:
        """The first that the webhook gets: for which receiver, and what it says."""

        def of_run() -> list[tuple[str, dict[str, Any]]]:
            return [(to, one) for to, one in self.webhook.told(alert, status) if one["labels"]["run"] == run]

        return wait_until(of_run, what=f"{alert} of {run} {status}")[0]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, s3_server) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "discovery").mkdir()  # else Prometheus looks for it every 15 s alone
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
        metrics = {"run": "pair", "discovery": str(folder / "discovery"), "peak_flops": 1e12}
        run = Run(folder / "training", build(folder), metrics=metrics, **TRAINING)
        found = Cluster(folder, prometheus, pushgateway, webhook, run)
        found.train = run.launch(*FLOAT16)
        stack.callback(end, found.train)
        threading.Thread(
            target=found.said.extend, args=(found.train.stdout,), daemon=True
        ).start()  # a full pipe stalls
        stand_in(found, stack)
        encode_many(found, f"{s3_server.url}/many")
        stack.callback(found.encode.kill)
        encode_and_push(found)
        wait_until(lambda: is_watched(found), 180, f"{SCRAPES} scrapes of each")
        yield found


def is_watched(cluster: Cluster) -> bool:
    """Whether each process was scraped often, also with the numbers that it tells last."""
    assert cluster.train.poll() is None, "".join(cluster.said)
    open_store(str(cluster.folder)).read("vae/config.json")  # of the stand-ins' storage something is to be told, too
    last = (
        'lathe_train_validation_seconds{run="pair"}',
        'lathe_encode_eta_seconds{run="latents"}',
        'lathe_first_stage_step{run="vae"}',
    )
    return all(cluster.prometheus.query(f"count_over_time({series}[15m]) >= {SCRAPES}") for series in last)


def settings(folder: Path, **changes: Any) -> EncodeConfig:
    tree = encode_settings(folder, folder / "latents").model_dump(mode="json")
    tree["images"]["filters"]["min_side"] = 33  # some pictures are unwanted
    tree["images"]["shards"] = changes.pop("images", tree["images"]["shards"])
    return EncodeConfig.model_validate({**tree, **changes})


def worker(config: EncodeConfig) -> Any:
    return forked.start(encode, config, (0, 1))


def encode_many(cluster: Cluster, output: str) -> None:
    """A job on S3 that Prometheus finds."""
    many = cluster.folder / "many"
    many.mkdir()
    for path in sorted((cluster.folder / "images").iterdir()):
        for copy in range(COPIES):
            os.link(path, many / f"{copy:03d}{path.name}")
    metrics = {"run": "latents", "discovery": str(cluster.discovery)}
    cluster.encode = worker(settings(cluster.folder, images=str(many), output=output, metrics=metrics))


def encode_and_push(cluster: Cluster) -> None:
    """A job that has ended."""
    metrics = {
        "run": "pushed",
        "prometheus": False,
        "pushgateway": cluster.pushgateway.url,
        "pushgateway_linger_seconds": 8,
    }
    process = worker(settings(cluster.folder, metrics=metrics))
    process.join(120)
    assert process.exitcode == 0


def stand_in(cluster: Cluster, stack: ExitStack) -> None:
    """A rank that has a GPU, a first stage, and two runs of one odd name, by the real exporter."""
    odd = [(ODD, "encode", output) for output in ("/here/odd", "/there/odd")]
    for run, job, output in (("gpu", "train", "/gpu"), ("vae", "first_stage", "/vae"), *odd):
        config = MetricsConfig(run=run, discovery=str(cluster.discovery))
        metrics = stack.enter_context(Metrics(config, job, Place(output), traffic=counters))
        for definition in DEFINITIONS:
            if job in definition.jobs and (job != "train" or definition.key in GPU):
                tell = metrics.add if definition.kind == "counter" else metrics.set
                tell(definition.key, 1.0, **dict.fromkeys(definition.labels, ODD))


def end(child: Any) -> None:
    """The launcher and its ranks, also if one is stopped."""
    for process in [*psutil.Process(child.pid).children(recursive=True), child] if child.poll() is None else []:
        process.kill()
    child.wait(30)


@pytest.mark.parametrize(("dashboard", "run"), [("train", "pair"), ("first-stage", "vae"), ("encode", "latents")])
def test_every_expression_of_the_dashboards_finds_data(cluster, dashboard, run):
    tree = json.loads((INFRA / f"grafana/dashboards/lathe-{dashboard}.json").read_text())
    asked = [target["expr"] for panel in tree["panels"] for target in panel.get("targets", ())]
    assert len(asked) > 20
    assert [expr for expr in asked if not finds_data(cluster, expr, run)] == []


def finds_data(cluster: Cluster, expr: str, run: str) -> bool:
    who = "gpu" if any(f"_{key}{{" in expr for key in GPU) else run
    now = time.time()
    asked = expr.replace("$run", who).replace("$__rate_interval", "5s")
    found = cluster.prometheus.ask("query_range", query=asked, start=now - 900, end=now, step=1)["result"]
    return any(not math.isnan(float(value)) for series in found for _, value in series["values"])


def test_values_are_those_of_the_log_within_a_scrape(cluster):
    keys = {d.key: d for d in DEFINITIONS if "train" in d.jobs}
    last = [line for line in read_log(cluster.run.store) if "loss" in line][-1]
    last = {key: value for key, value in last.items() if not key.startswith("checkpoint_")}  # told before their line
    selector = '{run="pair", rank="0"}'
    (steps,) = cluster.prometheus.query(f"lathe_train_step{selector}[15m]")
    scraped = {at: int(float(value)) for at, value in steps["values"]}
    found = [
        (key, tuple(series["metric"][name] for name in keys[key].labels), at, float(value))
        for key in last.keys() - {"step", "time"}
        for series in cluster.prometheus.query(f"lathe_train_{key}{selector}[15m]")
        for at, value in series["values"]
        if scraped.get(at)
    ]
    assert {(key, *labels) for key, labels, *_ in found} == {
        (key, *labels) for key, value in last.items() if key in keys and key != "step" for labels, _ in flat(value)
    }
    log = {line["step"]: line for line in read_log(cluster.run.store) if "loss" in line}
    for key, labels, at, value in found:
        # what is scraped in the midst of a report has some values of the next line
        lines = [log[step] for step in (scraped[at], scraped[at] + 1) if step in log]
        assert any(same(line.get(key), labels, value) for line in lines), (key, labels, at, value)
    timed = [(at, step) for at, step in scraped.items() if step in log and step + 1 in log]
    assert len(timed) >= SCRAPES // 2
    for at, step in timed:
        assert log[step]["time"] <= at + 1.1
        assert log[step + 1]["time"] >= at - 1.1


def same(logged: Any, labels: tuple[str, ...], told: float) -> bool:
    for label in labels:
        logged = logged.get(label) if logged is not None else None
    return not math.isfinite(told) if logged is None else told == pytest.approx(logged, rel=1e-8)


def test_counts_that_were_pushed_are_those_of_the_receipts_and_have_gone_with_the_job(cluster):
    store = open_store(str(cluster.folder / "latents/32"))
    receipts = [load_receipt(store, e.name) for e in store.list("") if e.name.endswith(RECEIPT_SUFFIX)]
    reasons = Counter(reject.reason for receipt in receipts for reject in receipt.rejects)
    assert told(cluster, "images") == {"": sum(receipt.samples() for receipt in receipts)}
    assert Counter(told(cluster, "rejects") | told(cluster, "filtered")) == reasons  # others are told as 0
    assert told(cluster, "finished") == {"": 1}
    assert 'run="pushed"' not in fetch(f"{cluster.pushgateway.url}/metrics")
    assert cluster.prometheus.query('lathe_encode_images_total{run="pushed"}') == []


def told(cluster: Cluster, key: str) -> dict[str, float]:
    """What was pushed last, by reason where there are reasons."""
    definition = next(d for d in DEFINITIONS if d.key == key and "encode" in d.jobs)
    found = cluster.prometheus.query(f'last_over_time({definition.name("encode")}{{run="pushed"}}[15m])')
    return {series["metric"].get("reason", ""): float(series["value"][1]) for series in found}


def test_two_runs_of_one_name_and_hostile_labels_are_scraped(cluster):
    found = cluster.prometheus.query('lathe_encode_rejects_total{run=~"odd.+"}')
    assert len({series["metric"]["instance"] for series in found}) == 2
    for series in found:
        assert series["metric"]["run"] == series["metric"]["reason"]
        assert series["metric"]["run"].isprintable()


def test_promtool_lints_what_is_scraped(cluster):
    targets = cluster.prometheus.ask("targets", state="active")["activeTargets"]
    urls = [target["scrapeUrl"] for target in targets if target["labels"]["job"] == "lathe"]
    assert len(urls) == 7
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
    to, alert = cluster.notice("LatheTrainerStalled", "pair")
    assert to == "night"
    assert re.fullmatch(r"pair: no step for [0-9.]+s", alert["annotations"]["summary"])
    assert alert["annotations"]["runbook_url"] == "docs/runbooks.md#lathetrainerstalled"
    wait_until(lambda: cluster.firing("LatheRankMissing"), what="the rank to be missed")
    rank.send_signal(signal.SIGCONT)
    cluster.notice("LatheTrainerStalled", "pair", "resolved")


def test_a_run_that_is_killed_wakes_somebody(cluster):
    for rank in cluster.ranks():
        rank.kill()
    to, _ = cluster.notice("LatheRunDown", "pair")
    assert to == "night"


def test_a_worker_that_is_killed_is_told_by_day(cluster):
    cluster.encode.kill()
    to, alert = cluster.notice("LatheEncodeWorkerMissing", "latents")
    assert to == "day"
    assert alert["labels"]["worker"] == "0"
