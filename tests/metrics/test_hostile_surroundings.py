"""Metrics among others who break things, by mistake or not: no job waits for them, or fails of them."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from socketserver import BaseRequestHandler, BaseServer, ThreadingTCPServer
from typing import Any

import pytest

from pipeline import storage
from pipeline.config import MetricsConfig
from pipeline.errors import SetupError
from pipeline.metrics import Metrics, Place, discovery, pushing, serving

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def _servers_look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseServer.serve_forever, "__defaults__", (0.01,))


def _until(is_so: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _page(address: str) -> str:
    return str(urllib.request.urlopen(address, timeout=10).read().decode())  # noqa: S310


class TestServing:
    def test_connections_that_say_nothing_or_little_are_broken_off(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(serving, "_MOST_CONNECTIONS", 4)
        monkeypatch.setattr(serving, "_ANSWER_SECONDS", 0.5)
        with Metrics(MetricsConfig(), "train") as metrics:
            place = ("127.0.0.1", int(metrics.address.split(":")[2].split("/")[0]))
            began = time.monotonic()
            held = [socket.create_connection(place, timeout=10) for _ in range(4)]
            for one in held[1:]:
                one.sendall(b"GET /")
            with socket.create_connection(place, timeout=10) as further:
                assert further.recv(1) == b""  # at once
            assert time.monotonic() - began < 0.5
            with suppress(OSError):
                while time.monotonic() - began < 10:
                    held[3].sendall(b"x")
                    time.sleep(0.02)
            assert [one.recv(1) for one in held[:3]] == [b""] * 3
            assert time.monotonic() - began < 5
            assert "lathe_train_step" in _page(metrics.address)
            for one in held:
                one.close()
        assert capfd.readouterr().err == ""

    def test_requests_that_are_none_are_no_news(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Metrics(MetricsConfig(), "train") as metrics:
            place = ("127.0.0.1", int(metrics.address.split(":")[2].split("/")[0]))
            for said in (
                b"GET http://[::1 HTTP/1.1\r\n\r\n",
                b"\x16\x03\x01\0\r\n\r\n",
                b"GET / HTTP/1.1\r\n:\r\n\r\n",
            ):
                with socket.create_connection(place, timeout=10) as one:
                    one.sendall(said)
                    one.shutdown(socket.SHUT_WR)
                    while one.recv(1 << 16):
                        pass
            assert "lathe_train_step" in _page(metrics.address)
        assert capfd.readouterr().err == ""

    def test_names_that_are_asked_for_are_answered(self) -> None:
        metrics = Metrics(MetricsConfig(), "encode", traffic=storage.counters)
        metrics.set("shards_done", 3)
        metrics.add("rejects", 2, reason="torn")
        storage.traffic.count("read", 0.3)
        with metrics:
            for name in ("lathe_encode_shards_done", "lathe_encode_rejects_total", "lathe_storage_request_seconds_sum"):
                page = _page(f"{metrics.address}?name[]={name}")
                lines = [line for line in page.splitlines() if not line.startswith("#")]
                assert lines, name
                assert all(line.startswith(name) for line in lines), lines

    @pytest.mark.parametrize("host", ["a..b", "x" * 70, "a\0b", "no-such-host.invalid", "192.0.2.7"])
    def test_what_is_no_host_of_ours_is_told(self, host: str) -> None:
        with pytest.raises(SetupError, match=r"metrics\.host=.*, metrics\.port=0: \w") as told:
            Metrics(MetricsConfig(host=host), "train")
        assert "metrics.prometheus=false" in told.value.remedy


class TestDiscovery:
    @pytest.mark.parametrize(
        "make",
        [
            os.mkfifo,
            lambda path: path.open("wb").truncate(1 << 26),
            lambda path: path.write_text("[" * 20_000),
            lambda path: path.write_text("[" * 200_000),
            lambda path: path.write_text('[{"targets": [' + "1" * 5000 + "]}]"),
            lambda path: path.write_bytes(b"\xff\xfe"),
            lambda path: path.symlink_to(path),
            lambda path: path.mkdir(),
        ],
    )
    @pytest.mark.parametrize("name", ["lathe-train-zz-0.json", "lathe-train-a-0.json"])
    def test_others_files_are_let_be(self, tmp_path: Path, make: Callable[[Path], Any], name: str) -> None:
        make(tmp_path / name)
        done = threading.Event()

        def start() -> None:
            with Metrics(MetricsConfig(discovery=str(tmp_path)), "train", Place("/runs/a")):
                done.set()

        threading.Thread(target=start, daemon=True).start()
        assert done.wait(5)
        assert "zz" not in name or os.path.lexists(tmp_path / name)

    @pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"\xff"), os.mkfifo])
    def test_the_own_file_replaced_by_something_else(self, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
        with Metrics(MetricsConfig(discovery=str(tmp_path)), "train", Place("/runs/a")):
            file = tmp_path / "lathe-train-a-0.json"
            file.unlink()
            damage(file)
        assert os.path.lexists(file)

    @pytest.mark.parametrize("is_in_the_way", [False, True])
    def test_a_folder_that_was_deleted_is_told_and_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_in_the_way: bool
    ) -> None:
        monkeypatch.setattr(discovery, "LOOK_SECONDS", 0.01)
        folder = tmp_path / "targets"
        with Metrics(MetricsConfig(discovery=str(folder)), "train", Place("/runs/a")):
            file = folder / "lathe-train-a-0.json"
            content = file.read_text()
            if is_in_the_way:
                folder.rename(tmp_path / "old")
                folder.write_bytes(b"")
                time.sleep(0.2)
                folder.unlink(missing_ok=True)
            else:
                shutil.rmtree(folder)
            _until(file.exists)
            assert file.read_text() == content
        said = capsys.readouterr().err
        assert said.count("Prometheus is told of this process there now") == 1, said
        assert said.count("Prometheus is not told of this process there") == is_in_the_way, said
        assert not any(folder.iterdir())

    def test_a_file_that_somebody_has_deleted_stays_away(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(discovery, "LOOK_SECONDS", 0.01)
        with Metrics(MetricsConfig(discovery=str(tmp_path)), "train", Place("/runs/a")):
            (tmp_path / "lathe-train-a-0.json").unlink()
            time.sleep(0.2)
            assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("hangs", ["mkdir", "unlink"])
    def test_a_folder_that_does_not_answer_keeps_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hangs: str
    ) -> None:
        """As one on a network that is away: at the start, or at the end."""
        monkeypatch.setattr(discovery, "ANSWER_SECONDS", 0.1)
        back, real = threading.Event(), getattr(Path, hangs)

        def wait(path: Path, *arguments: Any, **options: Any) -> None:
            if path in (folder, file):
                back.wait(10)
            real(path, *arguments, **options)

        folder = tmp_path / "targets"
        file = folder / "lathe-train-a-0.json"
        monkeypatch.setattr(Path, hangs, wait)
        began = time.monotonic()
        try:
            with Metrics(MetricsConfig(discovery=str(folder)), "train", Place("/runs/a")):
                pass
            assert time.monotonic() - began < 5
        finally:
            back.set()
        said = capsys.readouterr().err
        assert ("Prometheus is told of this process there once it does" in said) == (hangs == "mkdir"), said
        assert said.count(f"{folder} does not answer: {file.name} may stay there") == 1, said
        _until(lambda: folder.exists() and not any(folder.iterdir()))  # once it answers nothing is left

    def test_nobody_looks_after_the_end(self, tmp_path: Path) -> None:
        before = threading.active_count()
        with Metrics(MetricsConfig(discovery=str(tmp_path)), "train", Place("/runs/a")):
            assert threading.active_count() > before
        _until(lambda: threading.active_count() <= before)


class _Gateway(ThreadingTCPServer):
    """Answers every request with `answer`; where it drips, a letter at a time and without an end."""

    daemon_threads = True

    def __init__(self, answer: bytes, *, drips: bool = False) -> None:
        self.answer, self.drips, self.asked = answer, drips, 0
        super().__init__(("127.0.0.1", 0), _Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseRequestHandler):
    server: _Gateway

    def handle(self) -> None:
        self.server.asked += 1
        self.request.recv(1 << 20)
        self.request.sendall(self.server.answer)
        try:
            while self.server.drips:
                self.request.sendall(b"x")
                time.sleep(0.02)
        except OSError:
            pass


@pytest.fixture
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PERIOD_SECONDS", 0.02)
    monkeypatch.setattr(pushing, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(pushing, "LAST_ANSWER_SECONDS", 0.2)


def _pushed(url: str, linger_seconds: float = 0) -> MetricsConfig:
    return MetricsConfig(prometheus=False, pushgateway=url, pushgateway_linger_seconds=linger_seconds)


@pytest.mark.usefixtures("_fast")
class TestPushing:
    @pytest.mark.parametrize("end", [{}, {"failed": True}, {"stopped": True}])
    def test_a_gateway_that_drips_keeps_nobody(self, capsys: pytest.CaptureFixture[str], end: dict[str, bool]) -> None:
        with _Gateway(b"HTTP/1.1 200 OK\r\nX: ", drips=True) as gateway:
            metrics = Metrics(_pushed(gateway.url, linger_seconds=60), "encode")
            time.sleep(0.6)  # it is told while the job runs, and asked but once
            assert gateway.asked == 1
            began = time.monotonic()
            metrics.close(**end)
            assert time.monotonic() - began < 2
            gateway.drips = False
            gateway.shutdown()
        said = capsys.readouterr().err
        assert said.count("takes nothing (no whole answer in time); it is tried again") == 1, said
        assert said.count("was not told of the end (no whole answer in time): it keeps what it has of us") == 1, said

    def test_what_a_gateway_says_is_one_short_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = b"\x1b[31mno\rwarning: all is lost " + b"x" * 5000
        with _Gateway(b"HTTP/1.1 500 " + words + b"\r\nContent-Length: 0\r\n\r\n") as gateway:
            metrics = Metrics(_pushed(gateway.url), "encode")
            _until(lambda: gateway.asked > 1)
            metrics.close()
            gateway.shutdown()
        said = capsys.readouterr().err
        assert said.count("takes nothing (HTTP Error 500: ") == 1
        assert all(len(line) < 260 and line.startswith("metrics: ") for line in said.splitlines()), said
        assert not {"\x1b", "\r"} & set(said)

    def test_a_gateway_that_dies_in_mid_run_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        with _Gateway(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as gateway:
            metrics = Metrics(_pushed(gateway.url, linger_seconds=60), "encode")
            _until(lambda: gateway.asked > 1)
            gateway.shutdown()
        time.sleep(0.1)
        began = time.monotonic()
        metrics.close()
        assert time.monotonic() - began < 2
        said = capsys.readouterr().err
        assert said.count("takes nothing") == 1, said
        assert said.count("was not told of the end") == 1, said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("discovery", "a\0b"),
        ("pushgateway", "http://[::1"),
        ("pushgateway", "http://:9091"),
        ("pushgateway", "http://gateway:port"),
        ("pushgateway", "http://gateway:70000"),
        ("pushgateway", "http://a..b:9091"),
        ("pushgateway", f"http://{'x' * 70}:9091"),
    ],
)
def test_settings_that_could_never_be_used_are_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=field):
        MetricsConfig.model_validate({field: value})


@pytest.mark.parametrize("url", ["http://[::1]:9091", "https://push_gateway/path/", "http://10.0.0.1"])
def test_addresses_of_gateways(url: str) -> None:
    assert MetricsConfig(pushgateway=url).pushgateway == url
