"""Ranges come without botocore's calls; where they cannot, as they always did."""

from __future__ import annotations

from typing import Any

import pytest
from s3fs import S3FileSystem

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import StorageError
from pipeline.storage import Store, open_store, s3_ranges

DATA = bytes(range(256)) * 5000


@pytest.fixture
def store(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("AWS_PROFILE_OF_THIS_TEST", s3_url)  # a client of its own
    return open_store(s3_url)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that go the usual way."""
    found: list[str] = []
    usual = S3FileSystem._call_s3

    async def noted(self: S3FileSystem, method: str, **arguments: Any) -> Any:
        found.append(method)
        return await usual(self, method, **arguments)

    monkeypatch.setattr(S3FileSystem, "_call_s3", noted)
    return found


@pytest.mark.parametrize("name", ["a.tar", "ä b+c/d%20e.tar", "x?y#z&q=1.tar", "~tilde(1)'*!.tar", "日本/語"])
def test_any_key_is_read_directly(store: Store, calls: list[str], name: str) -> None:
    store.write(name, DATA)
    calls.clear()
    assert store.read(name, 0, 1) == DATA[:1]
    assert store.read(name, 1000, len(DATA) - 3) == DATA[1000:-3]
    assert store.read(name, len(DATA) - 5, len(DATA) + 100) == DATA[-5:]
    assert calls == []


def test_what_is_refused_is_asked_for_the_usual_way(store: Store, calls: list[str]) -> None:
    with pytest.raises(StorageError, match="no such object"):
        store.read("none", 0, 5)
    store.write("a", DATA)
    calls.clear()
    assert store.read("a", len(DATA), len(DATA) + 7) == b""
    assert calls == ["get_object"]
    assert store.read("a", 5, 7) == DATA[5:7]  # and others go on directly
    assert calls == ["get_object"]


class Unsigned:
    """A signature that the server refuses."""

    requests = 0

    def __init__(self, *about: object) -> None:
        pass

    def add_auth(self, request: object) -> None:
        Unsigned.requests += 1


def test_a_server_that_wants_other_signatures_is_not_asked_twice_for_each_range(
    store: Store, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("a", DATA)
    calls.clear()
    monkeypatch.setattr(s3_ranges, "S3SigV4Auth", Unsigned)
    assert [store.read("a", first, 9) for first in (3, 4, 5)] == [DATA[first:9] for first in (3, 4, 5)]
    assert calls == ["get_object"] * 3
    assert Unsigned.requests == 1


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_told_as_ever(
    s3_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(wrong, "wrong-and-secret")
    with pytest.raises(StorageError, match="refuses access to s3://lathe-tests") as caught:
        open_store(s3_server.url).read("x", 0, 5)
    assert "wrong-and-secret" not in str(caught.value)
