from __future__ import annotations

import logging
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.demo import object_store
from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.storage import Entry, Store, fetch_folder, find_shards, open_store, read_file, s3, split
from pipeline.storage.s3_client import client
from pipeline.storage.shards import expand_braces

RETRY = "LATHE_STORAGE_RETRY_SECONDS"


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "a/b") if request.param == "folder" else request.getfixturevalue("s3_url"))


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


class TestEveryStore:
    def test_what_is_written_is_read(self, store: Store) -> None:
        for data in (b"", b"x", os.urandom(100_000)):
            assert store.write("deep/er/file.bin", data)
            assert store.read("deep/er/file.bin") == data
        assert store.write("view", memoryview(b"0123456789")[2:4])
        assert store.read("view") == b"23"

    @pytest.mark.parametrize(
        ("start", "end"), [(None, None), (0, 4), (3, 3), (3, None), (None, 2), (9, 10), (8, 99), (10, 12), (50, None)]
    )
    def test_ranges_cut_as_slices_do(self, store: Store, start: int | None, end: int | None) -> None:
        store.write("r", b"0123456789")
        assert store.read("r", start, end) == b"0123456789"[start:end]

    def test_a_range_that_ends_before_it_begins_is_a_bug(self, store: Store) -> None:
        with pytest.raises(ValueError, match="range"):
            store.read("r", 3, 2)

    def test_listing_is_sorted_recursive_and_by_prefix(self, store: Store) -> None:
        assert store.list() == []
        for name in ("b/2.bin", "a.bin", "b/1.bin", "b-side.bin"):
            store.write(name, name.encode())
        everything = [Entry("a.bin", 5), Entry("b-side.bin", 10), Entry("b/1.bin", 7), Entry("b/2.bin", 7)]
        assert store.list() == everything
        assert store.list("b") == everything[1:]
        assert store.list("b/") == everything[2:]
        assert store.list("b/2") == everything[3:]
        assert store.list("c/") == []

    def test_a_file_is_made_once_where_it_must_be_absent(self, store: Store) -> None:
        assert store.write("claim", b"first", if_absent=True)
        assert not store.write("claim", b"second", if_absent=True)
        assert store.read("claim") == b"first"

    def test_one_of_many_threads_makes_the_file(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i: store.write("claim", b"%d" % i, if_absent=True), range(8)))
        assert sum(won) == 1
        assert store.read("claim") == b"%d" % won.index(True)

    def test_threads_share_a_store(self, store: Store) -> None:
        def round_trip(i: int) -> bool:
            data = bytes([i]) * 50_000
            store.write(f"t/{i}", data)
            return store.read(f"t/{i}") == data and store.read(f"t/{i}", 10, 20) == data[10:20]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(round_trip, range(32)))
        assert len(store.list("t/")) == 32

    def test_exists_and_delete(self, store: Store) -> None:
        store.write("x/1", b"1")
        store.write("x/2", b"2")
        assert store.exists("x/1")
        assert not store.exists("x")
        store.delete(["x/1", "never"])
        assert [e.name for e in store.list()] == ["x/2"]
        store.delete([])

    def test_files_travel_both_ways(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source.bin"
        source.write_bytes(os.urandom(300_000))
        store.upload(source, "up/loaded")
        store.download("up/loaded", tmp_path / "new/folder/copy")
        assert (tmp_path / "new/folder/copy").read_bytes() == source.read_bytes()
        store.write("empty", b"")
        store.download("empty", tmp_path / "empty")
        assert (tmp_path / "empty").read_bytes() == b""

    def test_what_is_missing_is_named(self, store: Store, tmp_path: Path) -> None:
        for ask in (lambda: store.read("no/such"), lambda: store.download("no/such", tmp_path / "here")):
            with pytest.raises(StorageError, match="no/such: no such") as caught:
                ask()
            assert caught.value.remedy
        assert not (tmp_path / "here").exists()
        with pytest.raises(StorageError, match="not-here"):
            store.upload(tmp_path / "not-here", "x")

    @pytest.mark.parametrize(
        "name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "a\0b", "a\nb", "..\\x"]
    )
    def test_names_stay_inside(self, store: Store, name: str, tmp_path: Path) -> None:
        for use in (
            lambda: store.read(name),
            lambda: store.write(name, b"bad"),
            lambda: store.exists(name),
            lambda: store.delete([name]),
            lambda: store.upload(Path(__file__), name),
        ):
            with pytest.raises(StorageError, match="not a name inside"):
                use()
        assert not (tmp_path / "x").exists()

    def test_a_listing_stays_inside(self, store: Store) -> None:
        for prefix in ("../", "/", "a/../../b"):
            with pytest.raises(StorageError, match="not a name inside"):
                store.list(prefix)

    def test_shards_are_found(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("00000.tar", "00001.tar", "00002.tar", "notes.txt", "deep/00003.tar", "x-1.tar"):
            store.write(name, b"")
        here = store.url

        def urls(*names: str) -> list[str]:
            return [f"{here}/{name}" for name in names]

        assert find_shards(here) == find_shards(f"{here}/") == urls("00000.tar", "00001.tar", "00002.tar", "x-1.tar")
        assert find_shards(f"{here}/0*.tar") == urls("00000.tar", "00001.tar", "00002.tar")
        assert find_shards(f"{here}/{{00001..00002}}.tar") == urls("00001.tar", "00002.tar")
        assert find_shards(f"{here}/{{deep/00003,x-[0-9]}}.tar") == urls("deep/00003.tar", "x-1.tar")
        assert find_shards(f"{here}/00001.tar") == urls("00001.tar")
        with pytest.raises(DataError, match=r"00003\.tar: no such shard"):
            find_shards(f"{here}/{{00000..00003}}.tar")
        with pytest.raises(DataError, match="no shards match"):
            find_shards(f"{here}/elsewhere")

    def test_a_folder_is_fetched(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            fetch_folder(store.url, tmp_path / "copy")
        store.write("config.json", b"{}")
        store.write("sub/weights", b"w")
        folder = fetch_folder(store.url, tmp_path / "copy")
        assert (folder / "sub/weights").read_bytes() == b"w"
        assert read_file(f"{store.url}/config.json") == b"{}"


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        ["gs://b/x", "http://h/x", "s3://", "s3:///x", "s3://b/../x", "s3://no spaces", "", "a\0b", "~nobody-here/x"],
    )
    def test_other_addresses_are_refused(self, url: str) -> None:
        with pytest.raises(StorageError):
            open_store(url)

    @pytest.mark.parametrize(
        ("url", "parts"),
        [
            ("s3://b/x/y.json", ("s3://b/x", "y.json")),
            ("s3://b/y", ("s3://b", "y")),
            ("/a/y", ("/a", "y")),
            ("/y", ("/", "y")),
            ("y", (".", "y")),
            ("a/y/", ("a", "y")),
        ],
    )
    def test_split(self, url: str, parts: tuple[str, str]) -> None:
        assert split(url) == parts

    @pytest.mark.parametrize("url", ["s3://b", "s3://b/", "/", "", "a/.."])
    def test_an_address_without_a_file(self, url: str) -> None:
        with pytest.raises(StorageError, match="names no file"):
            split(url)

    @given(first=st.integers(0, 999), count=st.integers(1, 50), width=st.integers(1, 6))
    def test_braces_count_with_leading_zeros(self, first: int, count: int, width: int) -> None:
        numbers = range(first, first + count)
        pattern = f"a{{{first:0{width}d}..{numbers[-1]}}}b{{x,y}}"
        assert expand_braces(pattern) == [f"a{n:0{width}d}b{c}" for n in numbers for c in "xy"]

    @given(st.text(alphabet="ab01/.-_*", max_size=30))
    def test_names_without_braces_stay(self, name: str) -> None:
        assert expand_braces(name) == [name]
        assert expand_braces(f"{name}{{only}}") == [f"{name}{{only}}"]

    def test_too_many_names(self) -> None:
        for pattern in ("{0..99999999999}", "{0..9999}{0..9999}"):
            with pytest.raises(DataError, match="stands for"):
                expand_braces(pattern)


class TestFolder:
    def test_a_full_disk_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path))
        store.write("f", b"old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(StorageError, match=r"f: no room to write it .* MiB free") as caught:
                store.write("f", bytes(1_000_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "free some disk space" in caught.value.remedy
        assert [p.name for p in tmp_path.iterdir()] == ["f"]
        assert store.read("f") == b"old"

    def test_a_writer_that_is_killed_leaves_a_whole_file(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pipeline.storage import open_store; store = open_store(sys.argv[1])\n"
            "while True:\n  for c in b'ab': store.write('f', bytes([c]) * 3_000_000); print('.', flush=True)"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.kill()
        writer.wait()
        store = open_store(str(tmp_path))
        assert store.read("f") in (b"a" * 3_000_000, b"b" * 3_000_000)
        assert store.list() == [Entry("f", 3_000_000)]  # what a killed writer leaves is not listed

    def test_a_file_in_place_of_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        with pytest.raises(StorageError, match="f/"):
            open_store(str(tmp_path / "f")).write("x", b"")

    def test_emptied_folders_go(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path / "root"))
        store.write("a/b/c", b"")
        store.delete(["a/b/c"])
        assert list((tmp_path / "root").iterdir()) == []

    def test_files_have_the_usual_rights(self, tmp_path: Path) -> None:
        open_store(str(tmp_path)).write("f", b"")
        (tmp_path / "g").write_bytes(b"")
        assert (tmp_path / "f").stat().st_mode == (tmp_path / "g").stat().st_mode


@pytest.mark.s3
class TestS3Errors:
    def test_missing_bucket(self, s3_server: EmbeddedObjectStore, tmp_path: Path) -> None:
        store = open_store("s3://no-such-bucket/p")
        asks: list[Callable[[], object]] = [
            lambda: store.read("x"),
            lambda: store.write("x", b""),
            store.list,
            lambda: store.exists("x"),
            lambda: store.download("x", tmp_path / "x"),
            lambda: store.delete(["x"]),
        ]
        for ask in asks:
            with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist") as caught:
                ask()
            assert s3_server.environment()["AWS_ENDPOINT_URL"] in caught.value.message

    @pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_keys(self, s3_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
        monkeypatch.setenv(wrong, "wrong-and-secret")
        store = open_store(s3_server.url)
        for ask in (lambda: store.read("x"), lambda: store.write("x", b""), lambda: store.exists("x"), store.list):
            with pytest.raises(StorageError, match="refuses access to s3://lathe-tests") as caught:
                ask()
            said = str(caught.value)
            assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy
            assert "\n" not in caught.value.message
            keys = {
                v for k, v in {**s3_server.environment(), **os.environ}.items() if "KEY" in k and k.startswith("AWS")
            }
            assert keys
            assert not any(value in said for value in keys)

    def test_no_keys(self, s3_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(StorageError, match="no S3 keys found"):
            open_store(s3_server.url).read("x")

    @pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan"])
    def test_retry_seconds_that_are_none(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv(RETRY, value)
        with pytest.raises(ConfigError, match=RETRY):
            open_store("s3://bucket").read("x")

    def test_passwords_in_addresses_are_not_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(RETRY, "0")
        environment = {
            "AWS_ENDPOINT_URL": "http://me:hunter2@127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "hidden",
        }
        with pytest.raises(StorageError) as caught:
            open_store("s3://bucket", environment).read("x")
        assert "hunter2" not in str(caught.value)
        assert "hidden" not in str(caught.value)


class TestLargeObjects:
    @pytest.fixture(autouse=True)
    def _small_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LATHE_S3_PART_MIB", "5")  # the least that S3 takes

    def test_parts_come_together(self, s3_url: str, tmp_path: Path) -> None:
        store, data = open_store(s3_url), os.urandom(12 * 2**20 + 7)
        (tmp_path / "up").write_bytes(data)
        store.upload(tmp_path / "up", "large")
        assert store.list() == [Entry("large", len(data))]
        store.download("large", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == data
        assert not store.write("large", data, if_absent=True)
        assert store.write("other", data, if_absent=True)

    def test_a_failed_upload_leaves_no_parts(self, s3_url: str, tmp_path: Path) -> None:
        local = tmp_path / "shrinks"
        local.write_bytes(bytes(12 * 2**20))
        store = open_store(s3_url)
        read = s3._read_exactly

        def shrink_then_read(path: Path, descriptor: int, first: int, end: int) -> bytes:
            os.truncate(local, 6 * 2**20)
            return read(path, descriptor, first, end)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(s3, "_read_exactly", shrink_then_read)
            with pytest.raises(StorageError, match="shrank"):
                store.upload(local, "x")
        assert store.list() == []
        assert _uploads(s3_url) == []

    def test_the_next_upload_clears_what_a_killed_one_left(self, s3_url: str) -> None:
        bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
        for name in ("x", "x-of-another"):
            client({}).call("create_multipart_upload", bucket, f"{prefix}/{name}")
        store, data = open_store(s3_url), bytes(6 * 2**20)
        store.write("x", data)
        assert _uploads(s3_url) == [f"{prefix}/x-of-another"]


def _uploads(url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = client({}).call("list_multipart_uploads", bucket, Prefix=prefix).get("Uploads", [])
    return sorted(upload["Key"] for upload in found)


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
        assert "does not answer; trying for 1 s more" in caplog.messages[0]

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

    def test_a_server_that_hangs(self, own_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(RETRY, "1")
        store = open_store(own_server.url, own_server.environment())
        store.write("x", b"x")
        assert own_server.pid
        os.kill(own_server.pid, signal.SIGSTOP)
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
        answers = [(503, busy), (500, b""), (200, b"content")]
        with _canned(answers) as endpoint:
            environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
            assert open_store("s3://bucket", environment).read("x") == b"content"
        monkeypatch.setenv(RETRY, "0.3")
        with (
            _canned([(503, busy)] * 50) as endpoint,
            pytest.raises(StorageError, match=r"kept failing on s3://bucket/x .*503 SlowDown"),
        ):
            open_store("s3://bucket", {**environment, "AWS_ENDPOINT_URL": endpoint}).read("x")


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


@contextmanager
def _canned(answers: list[tuple[int, bytes]]) -> Iterator[str]:
    """A server that gives these answers in turn: no package offers a busy S3."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    queue = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = next(queue)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _child(url: str, answers: multiprocessing.SimpleQueue[bytes]) -> None:
    store = open_store(url)
    store.write("child", b"from the child")
    answers.put(store.read("parent"))


class TestProcesses:
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_a_forked_child_makes_its_own_connections(self, s3_url: str) -> None:
        store = open_store(s3_url)
        store.write("parent", b"from the parent")
        fork = multiprocessing.get_context("fork")
        answers = fork.SimpleQueue()
        child = fork.Process(target=_child, args=(s3_url, answers))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        assert answers.get() == b"from the parent"
        assert store.read("child") == b"from the child"

    def test_leaving_is_quick_and_quiet(self, s3_url: str, tmp_path: Path) -> None:
        code = (
            "import sys, os, time, logging, pathlib; logging.basicConfig(level=logging.INFO)\n"
            "from pipeline.storage import open_store\n"
            "store = open_store(sys.argv[1]); store.write('x', b'x'); assert store.read('x') == b'x'\n"
            "pid = os.fork()\n"
            "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
            "else: store.read('x')\n"
            "if pid: pathlib.Path(sys.argv[2]).write_text(str(time.time()))\n"
        )
        stamp = tmp_path / "stamp"
        command = [sys.executable, "-W", "error", "-c", code, s3_url, str(stamp)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        ended = time.time()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert ended - float(stamp.read_text()) < 2

    def test_a_folder_costs_no_s3_import(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pipeline.storage import open_store; open_store(sys.argv[1]).write('x', b'')\n"
            "assert not {'s3fs', 'botocore', 'aiohttp'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
