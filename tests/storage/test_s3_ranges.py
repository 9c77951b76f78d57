"""Ranges come without botocore's calls; where they cannot, as they always did."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from s3fs import S3FileSystem

from pipeline.demo.object_store import EmbeddedObjectStore
from pipeline.errors import StorageError
from pipeline.storage import Store, open_store, s3_ranges, traffic

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
def test_all_ranges_of_an_object_but_the_first_are_read_directly(store: Store, calls: list[str], name: str) -> None:
    store.write(name, DATA)
    calls.clear()
    assert store.read(name, 0, 1) == DATA[:1]
    assert calls == ["get_object"]
    assert store.read(name, 0, 1) == DATA[:1]
    assert store.read(name, 1000, len(DATA) - 3) == DATA[1000:-3]
    assert store.read(name, len(DATA) - 5, len(DATA) + 100) == DATA[-5:]
    assert calls == ["get_object"]


def test_what_is_refused_is_asked_for_the_usual_way(store: Store, calls: list[str]) -> None:
    with pytest.raises(StorageError, match="no such object"):
        store.read("none", 0, 5)
    store.write("a", DATA)
    assert store.read("a", 5, 7) == DATA[5:7]
    calls.clear()
    for _ in range(5):
        assert store.read("a", len(DATA), len(DATA) + 7) == b""
        assert store.read("a", 5, 7) == DATA[5:7]
    store.delete(["a"])
    with pytest.raises(StorageError, match="no such object"):
        store.read("a", 5, 7)
    store.write("a", DATA[1:])
    assert store.read("a", 5, 7) == DATA[6:8]
    calls.clear()
    assert store.read("a", 6, 8) == DATA[7:9]  # and goes on directly
    assert calls == []


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
    monkeypatch.setattr(Unsigned, "requests", 0)
    before = sum(traffic.counters()["requests"].values())
    assert [store.read("a", first, 90) for first in range(20)] == [DATA[first:90] for first in range(20)]
    assert calls == ["get_object"] * 20
    assert Unsigned.requests == s3_ranges._REFUSALS
    assert sum(traffic.counters()["requests"].values()) - before == 20 + s3_ranges._REFUSALS


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1", "us-gov-west-1", "cn-north-1"])
@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
def test_an_address_is_that_of_ordinary_requests_in_every_region(
    region: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent: the first request is caught when it would be."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)

    async def find() -> tuple[str, str, s3_ranges.RangeReader]:
        keys = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "secret"}
        config = AioConfig(s3={"addressing_style": style}, retries={"total_max_attempts": 1})
        async with get_session().create_client("s3", region_name=region, config=config, **keys) as client:
            reader = s3_ranges.RangeReader(client)
            seen: list[str] = []

            def catch(request: Any, **_: Any) -> None:
                seen.append(request.url)
                raise ConnectionError

            client.meta.events.register_last("before-send.s3.GetObject", catch)
            reader.watch()
            with pytest.raises(ConnectionError):
                await client.get_object(Bucket="some.bucket", Key="a b/c.tar", Range="bytes=0-1")
            reader.learn("some.bucket", "a b/c.tar", refused=False)
            return region, seen[0], reader

    region, url, reader = asyncio.run(find())
    assert reader._addresses["some.bucket", "a b/c.tar"] == s3_ranges._Address(url, region)
    assert region == "us-east-1" or region in url


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_told_as_ever(
    s3_server: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(wrong, "wrong-and-secret")
    with pytest.raises(StorageError, match="refuses access to s3://lathe-tests") as caught:
        open_store(s3_server.url).read("x", 0, 5)
    assert "wrong-and-secret" not in str(caught.value)
