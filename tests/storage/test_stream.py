from __future__ import annotations

import gc
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StorageError
from pipeline.storage import Store, open_store, open_stream
from pipeline.storage.local import LocalFile
from pipeline.storage.stream import Stream

DATA = bytes(i * i % 251 for i in range(10_000))


class Counted:
    """An open file that notes what is asked of it, and may wait or fail first."""

    def __init__(self, before: Callable[[int], None] = lambda start: None) -> None:
        self.size, self.version = len(DATA), "v"
        self.asked: list[int] = []
        self.closed = threading.Event()
        self._before = before

    def read(self, start: int, end: int) -> bytes:
        self.asked.append(start)
        self._before(start)
        return DATA[start:end]

    def close(self) -> None:
        self.closed.set()


def settled(ask: Callable[[], object]) -> object:
    """What `ask` says once it has said the same for a while."""
    said, since = ask(), time.monotonic()
    while time.monotonic() - since < 0.1:
        if (now := ask()) != said:
            said, since = now, time.monotonic()
        time.sleep(0.005)
    return said


@pytest.mark.parametrize("part_bytes", [1, 999, 5_000, 10_000, 10_001])
def test_all_bytes_come_in_order(store: Store, part_bytes: int) -> None:
    data = DATA[:40] if part_bytes == 1 else DATA
    store.write("x", data)
    with open_stream(f"{store.url}/x", part_bytes=part_bytes) as stream:
        assert (stream.size, stream.name, stream.mode) == (len(data), f"{store.url}/x", "rb")
        assert (stream.readable(), stream.seekable(), stream.writable()) == (True, False, False)
        assert stream.version == store.list()[0].version
        assert stream.read(0) == b""
        assert stream.read(13) == data[:13]
        assert (stream.bytes_read, stream.tell()) == (13, 13)
        assert stream.sha256() == hashlib.sha256(data[:13]).hexdigest()
        assert stream.read() == data[13:]
        assert stream.read() == stream.read(5) == b""
        assert stream.bytes_read == len(data)
    assert stream.sha256() == hashlib.sha256(data).hexdigest()
    with pytest.raises(ValueError, match="closed"):
        stream.read()


@settings(max_examples=50, deadline=None)
@given(part_bytes=st.integers(100, 6000), parts_ahead=st.integers(1, 4), sizes=st.lists(st.integers(-1, 4000)))
def test_pieces_are_as_those_of_a_file(part_bytes: int, parts_ahead: int, sizes: list[int]) -> None:
    file = io.BytesIO(DATA)
    with Stream("x", Counted(), part_bytes, parts_ahead) as stream:
        for size in sizes:
            assert stream.read(size) == file.read(size)
            assert stream.sha256() == hashlib.sha256(DATA[: file.tell()]).hexdigest()
        buffer = bytearray(700)
        count = stream.readinto(buffer)
        assert bytes(buffer[:count]) == file.read(700)


def test_an_empty_file(store: Store) -> None:
    store.write("x", b"")
    with open_stream(f"{store.url}/x") as stream:
        assert stream.read() == b""
        assert stream.sha256() == hashlib.sha256(b"").hexdigest()


def test_a_tar_is_read_as_it_comes(store: Store) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 3_000
            tar.addfile(info, io.BytesIO(DATA[:3_000]))
    store.write("x.tar", buffer.getvalue())
    with open_stream(f"{store.url}/x.tar", part_bytes=700) as stream:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            members = {info.name: file.read() for info in tar if (file := tar.extractfile(info))}
        stream.read()  # padding after the end mark
        assert members == {"a": DATA[:3_000], "b": DATA[:3_000]}
        assert stream.sha256() == hashlib.sha256(buffer.getvalue()).hexdigest()


def test_it_stays_a_few_parts_ahead_and_no_more() -> None:
    file = Counted()
    with Stream("x", file, 100, 3) as stream:
        assert settled(lambda: len(file.asked)) == 3
        stream.read(1)
        assert settled(lambda: len(file.asked)) == 4
        stream.read(500)
        assert settled(lambda: len(file.asked)) == 9
    assert file.closed.wait(5)
    assert len(file.asked) == 9


def test_parts_are_asked_for_at_once() -> None:
    together = threading.Barrier(3, timeout=5)
    with Stream("x", Counted(lambda start: together.wait() and None), 4_000, 3) as stream:
        assert stream.read() == DATA


@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_end_in_the_middle_stops_the_threads(end: str) -> None:
    file = Counted()
    stream = Stream("x", file, 100, 3)
    assert stream.read(150) == DATA[:150]
    if end == "close":
        stream.close()
        stream.close()
    else:
        del stream
        gc.collect()
    assert file.closed.wait(5)
    asked = len(file.asked)
    assert settled(lambda: len(file.asked)) == asked < 10


def test_closing_does_not_wait_for_a_store_that_is_silent() -> None:
    silence = threading.Event()
    stream = Stream("x", Counted(lambda start: silence.wait(10) and None), 100, 3)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 1
    silence.set()


def test_what_came_before_an_error_is_given_first() -> None:
    def fail(start: int) -> None:
        if start == 600:
            raise StorageError("the disk is gone")

    file = Counted(fail)
    with Stream("x", file, 100, 3) as stream:
        assert stream.read(600) == DATA[:600]
        for _ in range(2):
            with pytest.raises(StorageError, match="disk is gone"):
                stream.read(1)
        assert stream.sha256() == hashlib.sha256(DATA[:600]).hexdigest()
    assert file.closed.wait(5)
    assert max(file.asked) <= 900


def test_what_is_not_there(store: Store) -> None:
    with pytest.raises(StorageError, match="no-such: no such"):
        open_stream(f"{store.url}/no-such")
    with pytest.raises(StorageError, match="names no file"):
        open_stream("s3://bucket")
    store.write("folder/x", b"")
    with pytest.raises(StorageError, match="folder"):
        open_stream(f"{store.url}/folder")
    for wrong in ({"part_bytes": 0}, {"parts_ahead": 0}):
        with pytest.raises(ValueError, match="positive"):
            open_stream(f"{store.url}/folder/x", **wrong)


class TestChanges:
    """A stream is of one version of its file, or an error."""

    @pytest.mark.parametrize("new", [DATA[::-1], DATA[:5_000], DATA * 2, b""], ids=["same", "less", "more", "none"])
    def test_an_object_replaced(self, s3_url: str, new: bytes) -> None:
        store = open_store(s3_url)
        store.write("x", DATA)
        with open_stream(f"{s3_url}/x", part_bytes=1_000, parts_ahead=1) as stream:
            came = [stream.read(1_000)]
            store.write("x", new)

            def read_on() -> None:
                while stream.bytes_read < len(DATA):
                    came.append(stream.read(1_000))

            with pytest.raises(StorageError, match=f"{s3_url}/x changed while it was read") as caught:
                read_on()
            assert caught.value.remedy
        assert b"".join(came) == DATA[: len(came) * 1_000]
        assert len(came) <= 2, "one part may have been ahead already"

    def test_an_object_deleted(self, s3_url: str) -> None:
        store = open_store(s3_url)
        store.write("x", DATA)
        with open_stream(f"{s3_url}/x", part_bytes=1_000, parts_ahead=1) as stream:
            store.delete(["x"])
            with pytest.raises(StorageError, match="no such object"):
                stream.read()

    def test_the_same_bytes_again_are_no_change(self, s3_url: str) -> None:
        store = open_store(s3_url)
        store.write("x", DATA)
        with open_stream(f"{s3_url}/x", part_bytes=1_000, parts_ahead=1) as stream:
            store.write("x", DATA)
            assert stream.read() == DATA

    def test_a_file_replaced_is_read_to_its_end(self, tmp_path: Path) -> None:
        store = open_store(str(tmp_path))
        store.write("x", DATA)
        with open_stream(str(tmp_path / "x"), part_bytes=1_000, parts_ahead=1) as stream:
            store.write("x", DATA[::-1])
            assert stream.read() == DATA
        with open_stream(str(tmp_path / "x"), part_bytes=1_000, parts_ahead=1) as stream:
            store.delete(["x"])
            assert stream.read() == DATA[::-1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda file: file.write(b"!"),
            lambda file: file.truncate(5_000),
            lambda file: file.seek(0, os.SEEK_END) and file.write(b"!"),
        ],
        ids=["overwritten", "cut", "appended"],
    )
    def test_a_file_changed_in_place(self, tmp_path: Path, change: Callable[[Any], None]) -> None:
        path = tmp_path / "x"
        path.write_bytes(DATA)
        os.utime(path, ns=(0, 0))  # file systems' clocks are coarse
        file = LocalFile(path)
        assert file.read(0, 1_000) == DATA[:1_000]
        with path.open("r+b") as writer:
            change(writer)
        for start in (0, 1_000, 9_000):
            with pytest.raises(StorageError, match="x changed while it was read"):
                file.read(start, start + 1_000)


def test_a_process_may_end_with_a_stream_open(s3_url: str, tmp_path: Path) -> None:
    open_store(s3_url).write("x", bytes(2**20))
    code = (
        "import sys; from pipeline.storage import open_stream\n"
        "stream = open_stream(sys.argv[1], part_bytes=1000); stream.read(1); kept = [stream, stream.read]"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, f"{s3_url}/x"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
