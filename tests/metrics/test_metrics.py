"""The metric table, the Prometheus endpoint and the JSON-lines log."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.config import MetricsConfig
from pipeline.errors import SetupError, StorageError
from pipeline.metrics import DEFINITIONS, LOG, Metrics, Place, read_log
from pipeline.metrics.page import up_to_date
from pipeline.storage import open_store

QUIET = MetricsConfig(prometheus=False)


@dataclass
class ObjectStore:
    """An object store in memory, as far as the log goes: whole writes, no appending."""

    url: str = "s3://bucket/run"
    objects: dict[str, bytes] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        return self.objects[name]

    def write(self, name: str, data: bytes) -> bool:
        self.objects[name] = data
        return True

    def list(self, prefix: str = ""):
        return [type("Entry", (), {"name": n})() for n in sorted(self.objects) if n.startswith(prefix)]

    def delete(self, names) -> None:
        for name in names:
            del self.objects[name]


def _scrape(address: str) -> str:
    assert address.startswith("http://127.0.0.1:")
    return urllib.request.urlopen(address, timeout=5).read().decode()  # noqa: S310


def test_names_follow_prometheus_conventions():
    names = [d.name(job) for d in DEFINITIONS for job in d.jobs]
    assert len(names) == len(set(names))
    for name in names:
        assert re.fullmatch(r"lathe_(train|first_stage|encode|storage)_[a-z0-9_]+", name)
        assert not re.search(r"_(ms|milliseconds|minutes|hours|days|kb|mb|bits|percent)(_|$)", name), (
            f"{name}: base units"
        )
    for one in DEFINITIONS:
        assert all(name.endswith("_total") == (one.kind == "counter") for name in map(one.name, one.jobs))
        assert not re.search(r"_(total|count|sum|bucket|info|gauge|counter|histogram|summary)$", one.key), one.key


def test_endpoint_serves_what_was_set():
    metrics = Metrics(MetricsConfig(), "train")
    try:
        metrics.set("loss", 0.25)
        text = _scrape(metrics.address)
        assert "lathe_train_loss 0.25" in text
        assert "# HELP lathe_train_loss " in text
        assert "lathe_first_stage" not in text
    finally:
        metrics.close()


def test_unknown_key_is_refused():
    with pytest.raises(KeyError):
        Metrics(QUIET, "first_stage").set("world_size", 1.0)


def test_a_value_may_be_told_by_its_labels(tmp_path):
    metrics = Metrics(QUIET, "train", log_store=open_store(str(tmp_path)))
    levels = {"main": {"0_0.00-0.55": 0.25, "1_0.55-1.00": 0.5}}
    metrics.log(7, {"validation_level_loss": levels, "validation_seconds": 2.5})
    metrics.close()
    found = metrics.registry.get_sample_value(
        "lathe_train_validation_level_loss", {"weights": "main", "noise_level": "1_0.55-1.00"}
    )
    assert found == 0.5
    (line,) = read_log(open_store(str(tmp_path)))
    assert {name: line[name] for name in ("step", "validation_level_loss", "validation_seconds")} == {
        "step": 7,
        "validation_level_loss": levels,
        "validation_seconds": 2.5,
    }


def test_what_a_line_lacks_of_a_metric_is_not_told_any_more(tmp_path):
    config = MetricsConfig(host="127.0.0.1", port=0)
    with Metrics(config, "train", log_store=open_store(str(tmp_path))) as metrics:
        metrics.log(1, {"noise_level_loss": {"0_0.00-0.50": 1.5, "1_0.50-1.00": 2.5}, "loss": 2.0})
        metrics.log(2, {"noise_level_loss": {"1_0.50-1.00": 3.5}})
        page = _scrape(metrics.address)
    told = {line for line in page.splitlines() if line.startswith(("lathe_train_noise", "lathe_train_loss"))}
    assert told == {'lathe_train_noise_level_loss{noise_level="1_0.50-1.00"} 3.5', "lathe_train_loss 2.0"}


def test_what_is_noted_stands_in_the_next_line(tmp_path):
    metrics = Metrics(QUIET, "train", log_store=open_store(str(tmp_path)))
    metrics.note("checkpoint_seconds", 2.0)
    assert metrics.registry.get_sample_value("lathe_train_checkpoint_seconds") == 2.0
    for step in (1, 2):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    lines = read_log(open_store(str(tmp_path)))
    assert [line.get("checkpoint_seconds") for line in lines] == [2.0, None]


def test_labels_tell_the_series_of_one_metric_apart():
    metrics = Metrics(MetricsConfig(), "encode")
    try:
        metrics.set("rejects", 2, reason="not_an_image")
        metrics.set("rejects", 1, reason='odd "quotes"\n')
        metrics.set("busy_ratio", 0.5, stage="decode")
        text = _scrape(metrics.address)
        assert 'lathe_encode_rejects_total{reason="not_an_image"} 2.0' in text
        assert 'lathe_encode_rejects_total{reason="odd \\"quotes\\"\\\\n"} 1.0' in text
        assert 'lathe_encode_busy_ratio{stage="decode"} 0.5' in text
        assert "lathe_encode_images_total 0.0" in text
    finally:
        metrics.close()


@pytest.mark.parametrize(
    ("key", "labels"), [("rejects", {}), ("rejects", {"stage": "decode"}), ("images", {"reason": "x"})]
)
def test_other_labels_than_the_tables_are_refused(key, labels):
    with pytest.raises(ValueError, match="label"):
        Metrics(QUIET, "encode").set(key, 1.0, **labels)


def test_taken_port_moves_on_to_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        metrics = Metrics(MetricsConfig(port=port), "train")
        try:
            assert f":{port}/" not in metrics.address
            assert "lathe_train_step" in _scrape(metrics.address)
        finally:
            metrics.close()


def test_two_jobs_in_one_process_do_not_share_a_registry():
    first, second = Metrics(QUIET, "train"), Metrics(QUIET, "train")
    first.set("loss", 1.0)
    assert second.registry.get_sample_value("lathe_train_loss") is None


def test_address_that_is_not_ours_names_the_field():
    with pytest.raises(SetupError, match=r"metrics\.host"):
        Metrics(MetricsConfig(host="192.0.2.1"), "train")


def test_other_ranks_serve_what_is_theirs_and_log_nothing(tmp_path):
    metrics = Metrics(MetricsConfig(), "train", Place(number=1, count=2), log_store=open_store(str(tmp_path)))
    metrics.log(1, {"loss": 1.0, "resident_memory_bytes": 5})
    metrics.set("rank_step", 7)
    text = _scrape(metrics.address)
    metrics.close()
    assert "lathe_train_rank_step 7.0" in text
    assert "lathe_train_resident_memory_bytes 5.0" in text
    assert "lathe_train_loss" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["folder", "objects"])
def log_store(request, tmp_path):
    return open_store(str(tmp_path / "run")) if request.param == "folder" else ObjectStore()


def test_log_is_read_back_across_restarts(log_store):
    first = Metrics(QUIET, "train", log_store=log_store)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": step / 3})
        if step % 2 == 0:
            first.flush()
    first.close()
    second = Metrics(QUIET, "train", log_store=log_store)
    second.resume(3)
    second.log(4, {"loss": 9.0, "learning_rate": 1e-4})
    second.close()
    lines = read_log(log_store)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] == 9.0
    assert lines[-1]["learning_rate"] == 1e-4
    assert lines[0]["loss"] == pytest.approx(1 / 3, rel=1e-8)


def test_lines_of_one_step_are_kept_though_it_is_flushed_between_them(log_store):
    metrics = Metrics(QUIET, "train", log_store=log_store)
    for step in (1, 2):
        for loss in (1.0, 2.0):
            metrics.log(step, {"loss": loss})
            metrics.flush()
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_log(log_store)] == [(1, 1.0), (1, 2.0), (2, 1.0), (2, 2.0)]


def test_a_line_that_the_store_does_not_take_waits_for_the_next(tmp_path):
    store = open_store(str(tmp_path / "run"))
    (tmp_path / "run").write_bytes(b"")
    metrics = Metrics(QUIET, "train", log_store=store)
    metrics.log(1, {"loss": 1.0})
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        metrics.flush()
    (tmp_path / "run").unlink()
    metrics.log(2, {"loss": 2.0})
    metrics.close()
    assert [line["step"] for line in read_log(store)] == [1, 2]


def test_resume_at_the_start_drops_everything(log_store):
    first = Metrics(QUIET, "train", log_store=log_store)
    first.log(5, {"loss": 1.0})
    first.close()
    Metrics(QUIET, "train", log_store=log_store).resume(0)
    assert read_log(log_store) == []


def test_folder_log_is_readable_while_the_run_goes_on_and_survives_a_torn_line(tmp_path):
    store = open_store(str(tmp_path))
    metrics = Metrics(QUIET, "train", log_store=store)
    metrics.log(1, {"loss": 0.5})
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_log(store)] == [1]
    metrics.close()


def test_numbers_that_json_lacks_become_null(tmp_path):
    store = open_store(str(tmp_path))
    metrics = Metrics(QUIET, "train", log_store=store)
    metrics.log(1, {"loss": float("nan"), "gradient_norm": float("inf")})
    metrics.close()
    line = json.loads((tmp_path / LOG).read_text())
    assert line["loss"] is None
    assert line["gradient_norm"] is None


def test_lines_that_are_none_of_ours_are_left_out(tmp_path):
    store = open_store(str(tmp_path))
    store.write("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[1]\n{"loss": 1}\n{"step": 2, "loss": 1.0}\n')
    assert [line["step"] for line in read_log(store)] == [1, 2]
    Metrics(QUIET, "train", log_store=store).resume(1)
    assert [line["step"] for line in read_log(store)] == [1]


def test_starts_are_counted_by_the_log(log_store):
    for start in range(3):
        metrics = Metrics(QUIET, "train", log_store=log_store)
        assert metrics.resume(4) == start
        metrics.log(4, {"restarts": start})
        metrics.flush()
        for step in (5, 6):  # killed before the next checkpoint
            metrics.log(step, {"loss": 1.0, "restarts": start})
        metrics.flush()
    assert [line["step"] for line in read_log(log_store)] == [4, 4, 4, 5, 6]
    assert Metrics(QUIET, "train", log_store=log_store).resume(0) == 3
    assert read_log(log_store) == []


def test_a_start_takes_no_lines_of_the_step_that_it_goes_on_from(log_store):
    first = Metrics(QUIET, "train", log_store=log_store)
    for step in (2, 4, 6):
        first.log(step, {"loss": float(step), "restarts": 0})
        first.flush()  # each part begins with its own step
    second = Metrics(QUIET, "train", log_store=log_store)
    assert second.resume(4) == 1
    second.log(4, {"restarts": 1})
    second.flush()
    second.log(6, {"loss": 7.0, "restarts": 1})
    second.close()
    assert [(line["step"], line.get("loss")) for line in read_log(log_store)] == [(2, 2), (4, 4), (4, None), (6, 7)]


def test_logs_from_before_starts_were_told_are_of_one(log_store):
    log_store.write("metrics.jsonl", b'{"step": 1, "validation_bound_bits": {"main": 2.0}}\n')
    log_store.write("metrics/00000001.jsonl", b'{"step": 1, "validation_bound_bits": {"main": 2.0}}\n')
    assert read_log(log_store) == [{"step": 1, "validation_bound": {"main": 2.0}}]
    assert Metrics(QUIET, "train", log_store=log_store).resume(1) == 1


def test_the_page_has_the_present_table():
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    text = page.read_text()
    assert text == up_to_date(text), "python -m pipeline.metrics.page docs/metrics.md"
    for one in DEFINITIONS:
        assert text.count(f"| {one.help} |") == 1, one.key
