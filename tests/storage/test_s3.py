from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import Entry, open_store, s3, traffic
from pipeline.storage.s3_client import S3Client, client

RETRY = "LATHE_STORAGE_RETRY_SECONDS"


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
        _begin_uploads(s3_url, "x", "x", "x-of-another")
        open_store(s3_url).write("x", bytes(6 * 2**20))
        assert _uploads(s3_url) == ["x-of-another"]

    def test_a_writer_killed_in_the_middle(self, s3_url: str) -> None:
        code = (
            "import sys; from pipeline.storage import open_store; store = open_store(sys.argv[1])\n"
            "data = bytes(30 * 2**20)\n"
            "while True: store.write('x', data)"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, s3_url])
        try:
            deadline = time.monotonic() + 30
            while True:
                os.kill(writer.pid, signal.SIGSTOP)  # else it may finish between the look and the kill
                if _uploads(s3_url):
                    break
                os.kill(writer.pid, signal.SIGCONT)
                assert time.monotonic() < deadline, "it never began"
                time.sleep(0.01)
        finally:
            writer.kill()
            writer.wait()
        store = open_store(s3_url)
        data = os.urandom(6 * 2**20)
        store.write("x", data)
        assert _uploads(s3_url) == []
        assert store.read("x") == data

    @pytest.mark.parametrize("times", [1, 3, 4])
    def test_an_upload_that_is_swept_begins_anew(
        self, s3_url: str, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        store, data = open_store(s3_url), os.urandom(11 * 2**20)
        swept = _sweep_at_first_parts(monkeypatch, s3_url, times)
        if times <= 3:
            assert store.write("x", data)
            assert store.read("x") == data
        else:
            with pytest.raises(StorageError, match="x: another process cleared its upload again and again") as caught:
                store.write("x", data)
            assert "other jobs" in caught.value.remedy
            assert store.list() == []
        assert len(swept) == times
        assert _uploads(s3_url) == []

    def test_a_swept_upload_of_what_is_there_is_done(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        store, data = open_store(s3_url), os.urandom(11 * 2**20)
        store.write("x", data)
        begun = _sweep_at_first_parts(monkeypatch, s3_url, 4)
        assert store.write("x", data)
        assert len(begun) == 1, "another writer had stored the same bytes"
        assert not store.write("x", data, if_absent=True), "but who asks to be first must not be told so"

    def test_writers_of_the_same_bytes_do_not_harm_each_other(self, s3_url: str) -> None:
        store, data = open_store(s3_url), os.urandom(6 * 2**20)
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(lambda _: store.write("x", data), range(6)))
        assert store.read("x") == data
        assert _uploads(s3_url) == []

    @pytest.mark.parametrize("value", ["", "4", "5.5", "-8", "6000", "many"])
    def test_part_sizes_that_are_none(self, s3_url: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("LATHE_S3_PART_MIB", value)
        with pytest.raises(ConfigError, match="LATHE_S3_PART_MIB"):
            open_store(s3_url).write("x", b"")


class TestSweep:
    def test_only_these_names(self, s3_url: str) -> None:
        _begin_uploads(s3_url, "a", "a", "deep/b", "deep/b2", "c")
        store = open_store(s3_url)
        assert store.leftovers() == ("a", "a", "c", "deep/b", "deep/b2")
        assert open_store(f"{s3_url}/deep").leftovers() == ("b", "b2")
        assert store.list() == []
        assert store.sweep(["a", "deep/b", "never"]) == 3
        assert store.leftovers() == ("c", "deep/b2")
        assert store.sweep(["a", "deep/b"]) == 0
        assert store.sweep([]) == 0
        assert open_store(f"{s3_url}/deep").sweep(["b2", "c"]) == 1
        assert store.leftovers() == ("c",)

    def test_only_the_old(self, s3_url: str) -> None:
        _begin_uploads(s3_url, "a")
        store = open_store(s3_url)
        assert store.sweep(["a"], older_than_seconds=60) == 0
        assert store.sweep(["a"], older_than_seconds=0) == 1

    def test_many_pages_are_one_listing(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        names = [f"n{i}" for i in range(7)]
        _begin_uploads(s3_url, *names)
        pages = []
        call = S3Client.call

        def small_pages(self: S3Client, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            if method == "list_multipart_uploads":
                pages.append(kwargs)
                kwargs["MaxUploads"] = 2
            return call(self, method, *args, **kwargs)

        monkeypatch.setattr(S3Client, "call", small_pages)
        assert open_store(s3_url).sweep(names[:-1]) == 6
        assert len(pages) == 4
        monkeypatch.undo()

    def test_while_another_is_written(self, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LATHE_S3_PART_MIB", "5")
        store, data = open_store(s3_url), os.urandom(11 * 2**20)
        _begin_uploads(s3_url, *["killed"] * 5)
        before = traffic.counters()["retries"]
        with ThreadPoolExecutor(1) as pool:
            written = pool.submit(store.write, "live", data)
            swept = 0
            while not written.done():
                swept += store.sweep(["killed", "live2"])
        assert written.result()
        assert swept == 5
        assert store.read("live") == data
        assert traffic.counters()["retries"] == before

    def test_what_is_refused(self, s3_server: EmbeddedObjectStore) -> None:
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            open_store("s3://no-such-bucket/p").sweep(["x"])
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
            open_store("s3://no-such-bucket/p").leftovers()
        with pytest.raises(StorageError, match="not a name inside"):
            open_store(s3_server.url).sweep(["../x"])


def _split(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, prefix


def _begin_uploads(url: str, *names: str) -> None:
    """What writers that are killed leave."""
    bucket, prefix = _split(url)
    for name in names:
        client({}).call("create_multipart_upload", bucket, f"{prefix}/{name}")


def _uploads(url: str) -> list[str]:
    bucket, prefix = _split(url)
    found = client({}).call("list_multipart_uploads", bucket, Prefix=f"{prefix}/").get("Uploads", [])
    return sorted(upload["Key"].removeprefix(f"{prefix}/") for upload in found)


def _sweep_at_first_parts(monkeypatch: pytest.MonkeyPatch, url: str, times: int) -> list[str]:
    """Another process that sweeps each upload once it has begun, so many times; the list grows as it does."""
    swept: list[str] = []
    call = S3Client.call

    def sweep_first(self: S3Client, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        answer = call(self, method, *args, **kwargs)
        if method == "create_multipart_upload" and len(swept) < times:
            swept.append(answer["UploadId"])
            call(self, "abort_multipart_upload", *args, UploadId=answer["UploadId"])
        return answer

    monkeypatch.setattr(S3Client, "call", sweep_first)
    return swept
