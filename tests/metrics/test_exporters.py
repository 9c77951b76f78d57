"""How Prometheus finds and reads the processes of a run: ports, discovery files, labels, a Pushgateway."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer

import pytest
from prometheus_client.openmetrics import exposition, parser
from scraping import scraped

from pipeline import stopping, storage
from pipeline.config import MetricsConfig, TrackedMetricsConfig
from pipeline.errors import StorageError
from pipeline.metrics import DEFINITIONS, Metrics, Place, discovery, pushing
from pipeline.metrics.numbers import MOST_SERIES
from pipeline.storage import open_store

QUIET = MetricsConfig(prometheus=False)


@pytest.fixture(autouse=True)
def _servers_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseServer.serve_forever, "__defaults__", (0.01,))


@pytest.fixture
def two_free_ports() -> int:
    """The first of two neighbours."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def test_ranks_of_a_machine_have_their_ports_in_order(two_free_ports: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = MetricsConfig(port=two_free_ports)
    ranks = [Metrics(config, "train", Place("/runs/a", number=8 + i, count=16, local=i)) for i in (1, 0)]
    try:
        assert [rank.address for rank in ranks] == [f"http://127.0.0.1:{two_free_ports + i}/metrics" for i in (1, 0)]
        assert "taken" not in capsys.readouterr().err
    finally:
        for rank in ranks:
            rank.close()


def test_a_port_that_is_taken_is_told_and_passed_by(capsys: pytest.CaptureFixture[str]) -> None:
    first = Metrics(MetricsConfig(), "train", Place("/runs/a"))
    port = int(first.address.split(":")[2].split("/")[0])
    second = Metrics(MetricsConfig(port=port), "train", Place("/runs/b"))
    try:
        assert second.address != first.address
        assert f"metrics: port {port} of 127.0.0.1 is taken: they are served at " in capsys.readouterr().err
        first.set("loss", 1.0)
        second.set("loss", 2.0)
        assert (scraped(first.address)["lathe_train_loss"], scraped(second.address)["lathe_train_loss"]) == (1.0, 2.0)
    finally:
        first.close()
        second.close()


def test_an_address_of_another_machine_ends_no_rank_but_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    rank = Metrics(MetricsConfig(host="192.0.2.1"), "train", Place(number=3, count=4))
    rank.set("rank_step", 1)
    rank.close()
    assert rank.address == ""
    assert "metrics: those of rank 3 are not served: metrics.host=192.0.2.1" in capsys.readouterr().err


def test_labels_that_data_bring_are_bounded_and_harmless() -> None:
    metrics = Metrics(MetricsConfig(), "encode", traffic=storage.counters)
    reasons = ['a"b', "line\nend", "\x1b[31mred", "\ud800", "x" * 5000, "back\\slash", "} lathe_encode_images_total 9"]
    try:
        for reason in [*reasons, *(f"reason {number}" for number in range(3 * MOST_SERIES))]:
            metrics.add("rejects", 1, reason=reason)
        prefix = "lathe_encode_rejects_total{reason="
        found = {name: value for name, value in scraped(metrics.address).items() if name.startswith(prefix)}
        assert len(found) == MOST_SERIES + 1
        assert sum(found.values()) == len(reasons) + 3 * MOST_SERIES
        labels = [name.removeprefix(prefix).removesuffix("}") for name in found]
        assert all(label.isprintable() and len(label) <= 128 for label in labels)
        assert {'a"b', "line\\nend", "\\x1b[31mred", "\\ud800", "back\\slash", "other"} < set(labels)
        assert scraped(metrics.address)["lathe_encode_images_total"] == 0
    finally:
        metrics.close()


def test_what_was_not_set_or_is_forgotten_is_not_told() -> None:
    metrics = Metrics(QUIET, "encode")
    told = metrics.registry.get_sample_value
    assert told("lathe_encode_eta_seconds") is None
    metrics.set("eta_seconds", 5)
    assert told("lathe_encode_eta_seconds") == 5
    metrics.forget("eta_seconds")
    assert told("lathe_encode_eta_seconds") is None


def test_storage_is_told_by_every_process(tmp_path: Path) -> None:
    metrics = Metrics(MetricsConfig(), "train", Place(number=1, count=2), traffic=storage.counters)
    try:
        before = scraped(metrics.address)
        store = open_store(str(tmp_path))
        store.write("x", bytes(1000))
        for _ in range(3):
            store.read("x")
        grown = {name: value - before.get(name, 0) for name, value in scraped(metrics.address).items()}
    finally:
        metrics.close()
    assert grown["lathe_storage_requests_total{operation=read}"] == 3
    assert grown["lathe_storage_read_bytes_total"] == 3000
    assert grown["lathe_storage_written_bytes_total"] == 1000
    assert grown["lathe_storage_request_seconds_count{operation=read}"] == 3
    assert grown["lathe_storage_request_seconds_bucket{le=+Inf,operation=write}"] == 1
    assert grown["lathe_storage_request_seconds_sum{operation=read}"] > 0


def test_every_definition_is_told_by_somebody() -> None:
    for job in ("train", "first_stage", "encode"):
        metrics = Metrics(QUIET, job, traffic=storage.counters)
        names = {family.name for family in metrics.registry.collect()}
        expected = {d.name(job) for d in DEFINITIONS if job in d.jobs}
        expected |= {d.name("storage") for d in DEFINITIONS if "storage" in d.jobs}
        assert {name.removesuffix("_total") for name in expected} == names


def test_what_is_served_is_openmetrics_too() -> None:
    storage.traffic.count("read", 0.3)
    metrics = Metrics(QUIET, "encode", traffic=storage.counters)
    metrics.add("rejects", 2, reason='a"b\\c')
    text = exposition.generate_latest(metrics.registry).decode()
    families = list(parser.text_string_to_metric_families(text))
    samples = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert samples["lathe_encode_rejects_total", 'a"b\\c'] == 2
    assert ("lathe_storage_request_seconds_count", "read") in samples


class TestDiscovery:
    def test_each_process_has_a_file_while_it_lives(self, tmp_path: Path) -> None:
        config = MetricsConfig(discovery=str(tmp_path / "targets"))
        ranks = [Metrics(config, "train", Place("s3://runs/sd15/", number=i, count=2)) for i in range(2)]
        files = sorted((tmp_path / "targets").iterdir())
        assert [file.name for file in files] == ["lathe-train-sd15-0.json", "lathe-train-sd15-1.json"]
        for number, (rank, file) in enumerate(zip(ranks, files, strict=True)):
            (entry,) = json.loads(file.read_text())
            assert [f"http://{target}/metrics" for target in entry["targets"]] == [rank.address]
            labels = {name: value for name, value in entry["labels"].items() if not name.startswith("__")}
            assert labels == {"lathe_job": "train", "run": "sd15", "rank": str(number), "host": socket.gethostname()}
        ranks[0].close()
        assert [file.name for file in (tmp_path / "targets").iterdir()] == ["lathe-train-sd15-1.json"]
        ranks[1].close(failed=True)
        assert [file.name for file in (tmp_path / "targets").iterdir()] == ["lathe-train-sd15-1.json"]

    def test_a_restart_takes_the_files_of_a_killed_start(self, tmp_path: Path) -> None:
        config = MetricsConfig(discovery=str(tmp_path))
        killed = [Metrics(config, "train", Place("/runs/a", number=i, count=4)) for i in range(4)]
        again = [Metrics(config, "train", Place("/runs/a", number=i, count=2)) for i in (1, 0)]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["lathe-train-a-0.json", "lathe-train-a-1.json"]
        killed[0].close()  # it was alive after all: what is ours stays
        assert again[1].address.removeprefix("http://").removesuffix("/metrics") in (
            (tmp_path / "lathe-train-a-0.json").read_text()
        )
        for rank in (*killed, *again):
            rank.close()
        assert list(tmp_path.iterdir()) == []

    def test_two_runs_of_one_name_do_not_take_each_others_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = MetricsConfig(discovery=str(tmp_path))
        runs = [Metrics(config, "train", Place(f"/{folder}/run")) for folder in ("one", "two")]
        names = sorted(file.name for file in tmp_path.iterdir())
        assert len(names) == 2
        assert f"lathe-train-run-0.json is of another run of this name: ours is {names[1]}" in capsys.readouterr().err
        for run in runs:
            run.close()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
    def test_nobody_answers_for_a_killed_process_whose_port_he_has(self, tmp_path: Path, host: str) -> None:
        def left(name: str, target: str, host: str = socket.gethostname()) -> str:
            labels = {"run": name, "host": host, "__lathe_output": f"/runs/{name}"}
            (tmp_path / f"lathe-train-{name}-0.json").write_text(json.dumps([{"targets": [target], "labels": labels}]))
            return f"lathe-train-{name}-0.json"

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        left("killed", f"127.0.0.1:{port}")
        others = {
            left("elsewhere", f"127.0.0.1:{port}", "gpu7"),
            left("beside", "127.0.0.1:1"),
        }
        (tmp_path / "lathe-train-mine-0.json").write_text("none of Lathe's")
        config = MetricsConfig(discovery=str(tmp_path), host=host, port=port)
        with Metrics(config, "encode", Place("/data/latents", 3, 4)) as ours:
            assert ours.address.endswith(f":{port}/metrics")
            there = {file.name for file in tmp_path.iterdir()}
        assert there == others | {"lathe-encode-latents-3.json", "lathe-train-mine-0.json"}

    def test_thousands_of_ranks_do_not_read_each_others_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, read = MetricsConfig(discovery=str(tmp_path)), []
        monkeypatch.setattr(discovery, "_known", lambda path: read.append(path.name))
        ranks = [Metrics(config, "train", Place("/runs/a", number, 8)) for number in range(8)]
        assert read == [f"lathe-train-a-{number}.json" for number in range(8)]  # each its own, which another may have
        for rank in ranks:
            rank.close()

    def test_a_worker_drops_the_file_of_a_killed_one_of_its_own_run(self, tmp_path: Path, two_free_ports: int) -> None:
        config = MetricsConfig(discovery=str(tmp_path), port=two_free_ports)
        Metrics(config, "encode", Place("/data/latents", 5, 8)).close(failed=True)
        with Metrics(config, "encode", Place("/data/latents", 3, 8)):
            assert [file.name for file in tmp_path.iterdir()] == ["lathe-encode-latents-3.json"]

    @pytest.mark.parametrize(
        ("number", "local", "is_told"), [(0, 0, False), (1, 1, False), (8, 0, True), (9, 1, False)]
    )
    def test_that_other_machines_cannot_come_here_is_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, local: int, is_told: bool
    ) -> None:
        for host in ("localhost", "0.0.0.0"):  # noqa: S104
            Metrics(
                MetricsConfig(discovery=str(tmp_path), host=host), "train", Place("/runs/a", number, 16, local)
            ).close()
        said = capsys.readouterr().err
        assert said.count("metrics: only a Prometheus on this machine finds localhost: set metrics.host") == is_told
        assert "finds 0.0.0.0" not in said

    def test_a_run_whose_log_cannot_be_finished_has_failed(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_bytes(b"")
        config = MetricsConfig(discovery=str(tmp_path / "targets"))
        metrics = Metrics(config, "train", log_store=open_store(str(tmp_path / "run")))
        metrics.log(1, {"loss": 1.0})
        with pytest.raises(StorageError):
            metrics.close()
        assert list((tmp_path / "targets").iterdir())

    def test_names_of_runs_and_workers(self, tmp_path: Path) -> None:
        config = MetricsConfig(discovery=str(tmp_path), run="big/run ü")
        with Metrics(config, "encode", Place("/data/latents", number=3, count=8)):
            (file,) = tmp_path.iterdir()
            assert file.name == "lathe-encode-big_run__-3.json"
            labels = json.loads(file.read_text())[0]["labels"]
            assert (labels["run"], labels["worker"], labels.get("rank")) == ("big/run ü", "3", None)
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_written_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_bytes(b"")
        with Metrics(MetricsConfig(discovery=str(tmp_path / "file" / "x")), "train") as metrics:
            assert "Prometheus is not told of this process there" in capsys.readouterr().err
            metrics.set("loss", 1.0)
            assert scraped(metrics.address)["lathe_train_loss"] == 1.0

    def test_every_interface_is_told_as_an_address_of_this_machine(self, tmp_path: Path) -> None:
        config = MetricsConfig(host="0.0.0.0", discovery=str(tmp_path))  # noqa: S104
        with Metrics(config, "train", Place("/runs/a")):
            target = json.loads((tmp_path / "lathe-train-a-0.json").read_text())[0]["targets"][0]
            assert not target.startswith("0.")
            assert "lathe_train_step" in urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode()


class Gateway(ThreadingHTTPServer):
    """A Pushgateway, as far as pushing goes: groups by path."""

    def __init__(self, port: int = 0) -> None:
        self.groups: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", port), _GatewayHandler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def before_delete(self) -> None:
        """Nothing."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _GatewayHandler(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.groups[self.path] = body
        self._answer(200)

    def do_DELETE(self) -> None:
        self.server.before_delete()
        self.server.groups.pop(self.path, None)
        self._answer(202)

    def _answer(self, status: int) -> None:
        self.server.asked.append((self.command, self.path))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(pushing, "PERIOD_SECONDS", 0.02)
    with Gateway() as server:
        yield server
        server.shutdown()


def _fail_after(metrics: Metrics, images: int) -> None:
    metrics.add("images", images)
    raise KeyError


def pushed(gateway: str, **settings: object) -> MetricsConfig:
    return MetricsConfig.model_validate(
        {"prometheus": False, "pushgateway": gateway, "pushgateway_linger_seconds": 0, **settings}
    )


class TestPushing:
    def test_the_last_numbers_are_there_for_a_scrape_and_then_deleted(self, gateway: Gateway) -> None:
        group = "/metrics/job/lathe/lathe_job/encode/run/latents/worker/2"
        with Metrics(pushed(gateway.url, pushgateway_linger_seconds=0.3), "encode", Place("/x/latents", 2, 4)) as told:
            told.add("images", 5)
            closing = threading.Thread(target=told.close)
            closing.start()
            time.sleep(0.15)
            assert "lathe_encode_images_total 5.0" in gateway.groups[group]
            closing.join()
        assert gateway.groups == {}
        assert gateway.asked[-2:] == [("PUT", group), ("DELETE", group)]

    def test_it_is_pushed_again_and_again(self, gateway: Gateway) -> None:
        with Metrics(pushed(gateway.url), "train", Place("/runs/a")) as metrics:
            (deadline, group) = (time.monotonic() + 5, "/metrics/job/lathe/lathe_job/train/rank/0/run/a")
            metrics.set("loss", 0.25)
            while "lathe_train_loss 0.25" not in gateway.groups.get(group, ""):
                assert time.monotonic() < deadline, gateway.groups.keys()
                time.sleep(0.005)

    def test_a_failed_jobs_numbers_stay(self, gateway: Gateway) -> None:
        with pytest.raises(KeyError), Metrics(pushed(gateway.url), "encode", Place("/x/y")) as metrics:
            _fail_after(metrics, 7)
        (group,) = gateway.groups.values()
        assert "lathe_encode_images_total 7.0" in group

    def test_one_that_was_stopped_waits_for_nobody(self, gateway: Gateway) -> None:
        began = time.monotonic()
        config = pushed(gateway.url, pushgateway_linger_seconds=60)
        with pytest.raises(KeyboardInterrupt), Metrics(config, "encode", Place("/x/y")):
            raise KeyboardInterrupt
        assert time.monotonic() - began < 5
        assert gateway.groups == {}

    @pytest.mark.parametrize("asked", ["by an exception", "in a long call"])
    def test_one_that_was_stopped_leaves_nothing_that_alerts(
        self, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
    ) -> None:
        files: list[bool] = []
        before = len(stopping._to_do)
        monkeypatch.setattr(Gateway, "before_delete", lambda _: files.append(any(tmp_path.iterdir())))
        config = MetricsConfig(discovery=str(tmp_path), pushgateway=gateway.url, pushgateway_linger_seconds=60)
        metrics = Metrics(config, "encode", Place("/x/y"))
        while not gateway.groups:
            time.sleep(0.005)
        if asked == "in a long call":
            stopping._do_all()
        else:
            metrics.close(stopped=True)
        assert gateway.groups == {}
        assert files == [False]  # a gateway that is silent keeps no file there
        metrics.close(stopped=True)
        assert len(stopping._to_do) == before

    def test_one_that_was_stopped_and_could_not_end_well_has_failed(self, gateway: Gateway, tmp_path: Path) -> None:
        (tmp_path / "run").write_bytes(b"")
        metrics = Metrics(pushed(gateway.url), "train", log_store=open_store(str(tmp_path / "run")))
        metrics.log(1, {"loss": 1.0})
        with pytest.raises(StorageError):
            metrics.close(stopped=True)
        assert gateway.groups

    def test_names_that_no_path_could_hold(self, gateway: Gateway) -> None:
        with Metrics(pushed(gateway.url, run="big/run"), "train"):
            time.sleep(0.1)
            (path,) = gateway.groups
        assert f"/run@base64/{urlsafe_b64encode(b'big/run').decode()}" in path

    def test_one_that_is_away_is_told_once_and_is_no_error(
        self, gateway: Gateway, capsys: pytest.CaptureFixture[str]
    ) -> None:
        url = gateway.url
        gateway.shutdown()
        gateway.server_close()
        with Metrics(pushed(url), "encode") as metrics:
            metrics.add("images", 1)
            time.sleep(0.2)
        said = capsys.readouterr().err
        assert said.count(f"metrics: the Pushgateway {url} takes nothing") == 1, said

    def test_its_return_is_told(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pushing, "PERIOD_SECONDS", 0.02)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        with Metrics(pushed(f"http://127.0.0.1:{port}"), "encode"):
            time.sleep(0.1)
            with Gateway(port) as back:
                deadline = time.monotonic() + 5
                while not back.groups and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.05)
                assert "metrics: the Pushgateway is back after" in capsys.readouterr().err
                back.shutdown()

    @pytest.mark.parametrize("address", ["ftp://x", "localhost:9091", ""])
    def test_what_is_no_address_of_one_is_refused(self, address: str) -> None:
        with pytest.raises(ValueError, match="pushgateway"):
            TrackedMetricsConfig(pushgateway=address)
