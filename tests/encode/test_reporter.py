"""A worker's figures on their way to Prometheus and to the progress line."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.config import MetricsConfig
from pipeline.encode.meter import Meter, Snapshot
from pipeline.encode.reporter import Reporter
from pipeline.metrics import DEFINITIONS, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(MetricsConfig(prometheus=False), "encode")


def figure(metrics: Metrics, key: str, **labels: str) -> float | None:
    (one,) = (d for d in DEFINITIONS if d.key == key and "encode" in d.jobs)
    return metrics.registry.get_sample_value(one.name("encode"), labels)


def test_every_figure_of_the_meter_reaches_prometheus(metrics: Metrics) -> None:
    now = [50.0]
    meter = Meter(1000, 4, decoders=1, clock=lambda: now[0], shards_before=1)
    began = time.time()
    with Reporter(meter, metrics):
        assert figure(metrics, "eta_seconds") is None
        assert figure(metrics, "rejects", reason="not_an_image") == figure(metrics, "filtered", reason="removed") == 0
        assert (
            figure(metrics, "filtered", reason="filtered_where") == figure(metrics, "rejects", reason="no_image") == 0
        )
        assert figure(metrics, "last_commit_timestamp_seconds") is None  # the shard before is no commit of this run
        with meter.busy("decode"):
            now[0] += 10
        meter.count(images=30, rejected={"not_an_image": 2}, filtered={"filtered_where": 3}, read=500, written=70)
        meter.count(shards=1)
    expected = {
        "images": 30,
        "images_per_second": 3,
        "read_bytes": 500,
        "written_bytes": 70,
        "shards_done": 2,
        "target_shards": 4,
        "eta_seconds": 10,
        "finished": 0,
    }
    assert {key: figure(metrics, key) for key in expected} == pytest.approx(expected)
    assert figure(metrics, "rejects", reason="not_an_image") == 2
    assert figure(metrics, "filtered", reason="filtered_where") == 3
    assert figure(metrics, "busy_ratio", stage="decode") == pytest.approx(1)
    assert figure(metrics, "busy_ratio", stage="upload") == 0
    assert began <= (figure(metrics, "last_commit_timestamp_seconds") or 0) <= time.time()
    assert (figure(metrics, "resident_memory_bytes") or 0) > 1e6


def test_the_watcher_hears_of_start_middle_and_end(metrics: Metrics) -> None:
    heard: list[Snapshot] = []
    again = threading.Event()

    def hear(snapshot: Snapshot) -> None:
        heard.append(snapshot)
        if snapshot.images:
            again.set()

    meter = Meter(1000, 4, decoders=1)
    with Reporter(meter, metrics, hear, period_seconds=0.001):
        assert heard[0].images == 0
        meter.count(images=1)
        assert again.wait(10)
        meter.count(images=1, shards=4)
    assert heard[-1].images == 2
    assert (heard[-1].done, heard[-1].eta_seconds) == (4, 0)
    assert (figure(metrics, "images"), figure(metrics, "finished")) == (2, 1)
    told = len(heard)
    again.clear()
    assert not again.wait(0.02)
    assert len(heard) == told


def test_the_end_is_told_where_the_work_fails_too(metrics: Metrics) -> None:
    meter = Meter(1000, 4, decoders=1)

    def work() -> None:
        with Reporter(meter, metrics):
            meter.count(images=7)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert figure(metrics, "images") == 7
    assert "report" not in {thread.name for thread in threading.enumerate()}
