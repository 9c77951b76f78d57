from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from canned_s3 import Answer, canned_s3

from pipeline.demo import object_store
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import StorageError
from pipeline.storage import counters, open_store, open_stream

RETRY = "LATHE_STORAGE_RETRY_SECONDS"


@pytest.fixture(scope="module")
def _own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedObjectStore]:
    """A server that a test may stop: not the one the other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "_STOP_SECONDS", 0.1)
        with EmbeddedObjectStore(tmp_path_factory.mktemp("own"), "lathe-own") as server:
            yield server


@pytest.fixture
def own_server(_own_server: EmbeddedObjectStore) -> EmbeddedObjectStore:
    if _own_server.pid is None:
        _own_server.start()
    return _own_server


@pytest.mark.s3
class TestOutages:
    def test_a_server_that_is_down(
        self, own_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv(RETRY, "1")
        store = open_store(own_server.url, own_server.environment())
        store.write("x", b"x")
        own_server.stop()
        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool, caplog.at_level(logging.WARNING, "lathe.storage"):
            errors = [f.exception() for f in [pool.submit(store.read, "x") for _ in range(4)]]
        assert 0.9 < time.monotonic() - began < 5
        for error in errors:
            assert isinstance(error, StorageError)
            assert re.search(r"S3 at http://127.0.0.1:\d+ did not answer for 1 s", error.message)
        assert len(caplog.messages) == 1, "one line an outage, not one a thread"
        assert re.search("does not answer; trying for [01] s more", caplog.messages[0])  # rounded, after the first one

    def test_a_server_that_comes_back_during_a_read(
        self, own_server: EmbeddedObjectStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = open_store(own_server.url, own_server.environment())
        data = os.urandom(200_000)
        store.write("x", data)
        own_server.stop()
        done = threading.Event()

        def come_back() -> None:
            time.sleep(0.7)
            own_server.start()
            done.wait(60)  # the server ends with the thread that started it
            own_server.stop()

        back = threading.Thread(target=come_back)
        with caplog.at_level(logging.WARNING, "lathe.storage"):
            back.start()
            assert store.read("x") == data
            assert store.write("y", data)
        done.set()
        back.join()
        assert ["answer" in line for line in caplog.messages] == [True, True]  # gone, and back

    def test_a_stream_goes_on_once_the_server_is_back(
        self, own_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in own_server.environment().items():
            monkeypatch.setenv(name, value)
        data = os.urandom(2_000_000)
        open_store(own_server.url).write("x", data)
        before = counters()
        with open_stream(f"{own_server.url}/x", part_bytes=100_000) as stream, ThreadPoolExecutor(1) as pool:
            came = stream.read(150_000)
            assert own_server.pid
            os.kill(own_server.pid, signal.SIGKILL)
            own_server.stop()
            rest = pool.submit(stream.read)
            time.sleep(0.7)
            assert not rest.done()
            own_server.start()
            assert came + rest.result() == data
            assert stream.sha256() == hashlib.sha256(data).hexdigest()
        now = counters()
        assert now["retries"] > before["retries"]
        requests = sum(now["requests"].values()) - sum(before["requests"].values())
        assert requests >= now["retries"] - before["retries"] + 21
        assert now["read_bytes"] - before["read_bytes"] == len(data)

    def test_a_stream_whose_server_stays_away(
        self, own_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {**own_server.environment(), RETRY: "1"}.items():
            monkeypatch.setenv(name, value)
        open_store(own_server.url).write("x", bytes(1_000_000))
        errors = counters()["errors"].get("transient", 0)
        with open_stream(f"{own_server.url}/x", part_bytes=100_000) as stream:
            stream.read(1)
            own_server.stop()
            with pytest.raises(StorageError, match="did not answer for 1 s"):
                stream.read()
        assert counters()["errors"]["transient"] > errors

    def test_a_server_that_hangs(self, own_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(RETRY, "1")
        store = open_store(own_server.url, own_server.environment())
        store.write("x", b"x")
        assert own_server.pid
        os.kill(own_server.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, own_server.pid, os.WSTOPPED | os.WNOWAIT)  # until then its other threads may answer
        try:
            with pytest.raises(StorageError, match="did not answer"):
                store.read("x")
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        assert store.read("x") == b"x"

    def test_an_answer_that_is_lost_does_not_lose_the_claim(self, own_server: EmbeddedObjectStore) -> None:
        with _drop_answers(own_server, count=1) as endpoint:
            store = open_store(own_server.url, {**own_server.environment(), "AWS_ENDPOINT_URL": endpoint})
            assert store.write("mine", b"my claim", if_absent=True), "the first attempt wrote it; its answer was lost"
        with _drop_answers(own_server, count=1) as endpoint:
            store = open_store(own_server.url, {**own_server.environment(), "AWS_ENDPOINT_URL": endpoint})
            assert not store.write("mine", b"another", if_absent=True)

    def test_a_body_cut_short_is_read_again(self, own_server: EmbeddedObjectStore) -> None:
        data = os.urandom(500_000)
        open_store(own_server.url, own_server.environment()).write("cut", data)
        with _drop_answers(own_server, count=2, after=200_000) as endpoint:
            store = open_store(own_server.url, {**own_server.environment(), "AWS_ENDPOINT_URL": endpoint})
            assert store.read("cut") == data

    def test_busy_answers_are_waited_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        busy = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
        answers = iter([Answer(503, busy), Answer(500), Answer(200, b"content")])
        with canned_s3(lambda _: next(answers)) as environment:
            assert open_store("s3://bucket", environment).read("x") == b"content"
        monkeypatch.setenv(RETRY, "0.3")
        with (
            canned_s3(lambda _: Answer(503, busy)) as environment,
            pytest.raises(StorageError, match=r"kept failing on s3://bucket/x .*503 SlowDown"),
        ):
            open_store("s3://bucket", environment).read("x")


@contextmanager
def _drop_answers(server: EmbeddedObjectStore, *, count: int, after: int = 0) -> Iterator[str]:
    """A network that cuts the first `count` connections once the server's answer has `after` bytes."""
    port = int(server.environment()["AWS_ENDPOINT_URL"].rpartition(":")[2])
    left = iter(range(count))
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, limit: float) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                if passed + len(data) > limit:
                    sink.sendall(data[: int(limit) - passed])
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", port))
            limit = float("inf") if next(left, None) is None else after
            threading.Thread(target=pump, args=(near, far, float("inf")), daemon=True).start()
            threading.Thread(target=pump, args=(far, near, limit), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
