"""Faults of an S3 server, of its keys and of its clock, found on a real one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from threading import Thread

import pytest

from pipeline.demo import object_store
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.storage import open_store

pytestmark = pytest.mark.s3

READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "may-not-write"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedObjectStore]:
    """A server that knows a second key, which may read alone."""
    write = object_store._write_private

    def with_reader(path: Path, text: str) -> None:
        tree = json.loads(text)
        keys = {"accessKey": READER["AWS_ACCESS_KEY_ID"], "secretKey": READER["AWS_SECRET_ACCESS_KEY"]}
        tree["identities"].append({"name": "reader", "credentials": [keys], "actions": ["Read", "List"]})
        write(path, json.dumps(tree))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "_write_private", with_reader)
        with EmbeddedObjectStore(tmp_path_factory.mktemp("doctor-s3"), "doctor") as started:
            yield started


@pytest.fixture
def root(server: EmbeddedObjectStore, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix that holds the latents, with the server's own keys in the environment."""
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(f"{server.url}/latents")
    if not store.exists("manifest.json"):
        for file in (place / "latents").iterdir():
            store.upload(file, file.name)
    return server.url


@pytest.fixture
def remote(training, root: str) -> Callable[..., dict]:
    """Examine the training, all of it on S3."""
    return lambda *changes: training(f"manifest={root}/latents/manifest.json", f"output={root}/run", *changes)


def failing(found: dict) -> set[str]:
    return {finding.check for finding in found.values() if finding.verdict == "fail"}


def test_a_healthy_set_up_passes_and_nothing_stays_behind(remote, root):
    found = remote()
    assert {finding.verdict for finding in found.values()} == {"pass"}, found
    assert {"storage", "clock", "output", "manifest", "resume"} < set(found)
    assert "disk" not in found
    assert not open_store(f"{root}/run").list()
    assert os.environ.get("LATHE_STORAGE_RETRY_SECONDS") is None


def test_a_bucket_that_is_not_there(remote):
    found = remote("output=s3://doctors/run")
    assert failing(found) == {"output"}
    assert "doctors" in found["output"].said
    assert found["output"].remedy


def test_a_manifest_that_is_not_there(remote, root):
    found = remote(f"manifest={root}/lost/manifest.json")
    assert failing(found) == {"manifest"}
    assert f"{root}/lost/manifest.json" in found["manifest"].said
    assert found["latents"].said == "not looked at, since manifest failed"


def test_a_wrong_key(remote, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    found = remote()
    assert failing(found) == {"output", "manifest"}
    for check in ("output", "manifest"):
        assert "AWS_SECRET_ACCESS_KEY" in found[check].remedy
    assert found["storage"].verdict == "pass"


def test_no_keys(remote, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    found = remote()
    assert failing(found) == {"storage"}
    assert "no S3 keys found" in found["storage"].said
    assert "AWS_PROFILE" in found["storage"].remedy


def test_a_key_that_may_read_alone(remote, root, monkeypatch):
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    found = remote()
    assert failing(found) == {"output"}
    assert "rights on the bucket" in found["output"].remedy
    assert found["manifest"].verdict == found["shards"].verdict == "pass"
    assert not open_store(f"{root}/run").list()


@pytest.mark.parametrize(("seconds", "verdict"), [(3600, "fail"), (-120, "warn"), (0, "pass")])
def test_a_clock_that_is_wrong(remote, server, monkeypatch, seconds, verdict):
    with shifted_clock(server, seconds) as endpoint:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, endpoint)
        found = remote()
    assert found["clock"].verdict == verdict, found["clock"]
    assert failing(found) <= {"clock"}
    if seconds:
        said = re.search(r"clock is (\d+) s (behind|ahead of) the S3 server's", found["clock"].said)
        assert said is not None
        assert abs(int(said[1]) - abs(seconds)) <= 2
        assert said[2] == ("behind" if seconds > 0 else "ahead of")
        assert "NTP" in found["clock"].remedy


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_a_server_that_does_not_answer_is_told_soon(remote, server, monkeypatch, how):
    if how == "silent":
        os.kill(server.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    else:
        server.stop()
        monkeypatch.setenv("LATHE_STORAGE_RETRY_SECONDS", "1")  # a user who wants less gets it
    began = time.monotonic()
    try:
        found = remote()
    finally:
        seconds = time.monotonic() - began
        if how == "silent":
            os.kill(server.pid, signal.SIGCONT)
        else:
            server.start()
    assert failing(found) == {"storage"}
    assert "did not answer" in found["storage"].said
    assert "AWS_ENDPOINT_URL" in found["storage"].remedy
    assert found["output"].said == found["latents"].said == "not looked at, since storage failed"
    assert seconds < 15


@contextmanager
def shifted_clock(server: EmbeddedObjectStore, seconds: int) -> Iterator[str]:
    """A proxy before the server whose answers say another time; yields its address."""
    port = int(server.environment()["AWS_ENDPOINT_URL"].rpartition(":")[2])
    listener = socket.create_server(("127.0.0.1", 0))

    def forward(source: socket.socket, sink: socket.socket, change: Callable[[bytes], bytes]) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(change(data))
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def shifted(data: bytes) -> bytes:
        date = formatdate(time.time() + seconds, usegmt=True).encode()
        return re.sub(rb"(?im)^Date: [^\r\n]*", b"Date: " + date, data)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", port))
            for line in ((client, upstream, bytes), (upstream, client, shifted)):
                Thread(target=forward, args=line, daemon=True).start()

    Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
