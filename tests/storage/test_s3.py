from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import ConfigError, StorageError
from pipeline.storage import Entry, open_store, s3
from pipeline.storage.s3_client import client

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
