"""Servers that are silent, trickle, or take their time honestly: what is asked for again, and when."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from canned_s3 import Answer, Request, canned_s3, part_of

from pipeline.errors import ConfigError, StorageError
from pipeline.storage import GIVE_UP_VARIABLE, Store, counters, open_store, s3_client, s3_pace
from pipeline.storage.s3_pace import Pace, pace

DATA = bytes(range(256)) * 160
pytestmark = pytest.mark.alone

RETRY, RATE = "LATHE_STORAGE_RETRY_SECONDS", "LATHE_STORAGE_MIN_KIB_PER_SECOND"
WAYS = pytest.mark.parametrize("way", ["direct", "usual", "whole"])
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


class Server:
    """Sends parts of DATA, some of them in pieces with a pause before each: as many requests as `pauses` has."""

    def __init__(self) -> None:
        self.pauses: Iterator[float] = iter(())
        self.piece_bytes = 1
        self.seen = 0

    def __call__(self, request: Request) -> Answer:
        self.seen += 1
        if "list-type" in request.path:
            time.sleep(next(self.pauses, 0))
            return Answer(200, LISTING)
        answer = part_of(DATA, request)
        assert isinstance(answer.body, bytes)
        pause = next(self.pauses, None)
        if pause is None:
            return answer
        headers = {**answer.headers, "Content-Length": str(len(answer.body))}
        return Answer(answer.status, _pieces(answer.body, self.piece_bytes, pause), headers)


def _pieces(data: bytes, length: int, pause: float) -> Iterator[bytes]:
    for first in range(0, len(data), length):
        yield data[first : first + length]
        time.sleep(pause)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Whose limits are low."""
    monkeypatch.setattr(s3_pace, "_LEAST_BEGIN_SECONDS", 0.3)
    monkeypatch.setattr(s3_pace, "_LEAST_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(s3_client, "_MAX_DELAY_SECONDS", 0.01)
    return Server()


@pytest.fixture
def environment(server: Server) -> Iterator[dict[str, str]]:
    with canned_s3(server) as environment:
        yield environment | {RETRY: "1", RATE: "400"}


@pytest.fixture
def store(environment: dict[str, str]) -> Store:
    return open_store("s3://bucket", environment)


def read(store: Store, way: str) -> bytes:
    return store.read("x.tar") if way == "whole" else store.read("x.tar", 0, len(DATA))


def prepare(store: Store, server: Server, way: str, *pauses: float) -> None:
    if way == "direct":
        store.read("x.tar", 0, 5)
    server.pauses, server.seen = iter(pauses), 0


@WAYS
def test_a_trickle_is_asked_for_again(server: Server, store: Store, way: str, caplog: pytest.LogCaptureFixture) -> None:
    prepare(store, server, way, 0.05)
    retries, began = counters()["retries"], time.monotonic()
    with caplog.at_level(logging.WARNING, "lathe.storage"):
        assert read(store, way) == DATA
    assert 0.3 < time.monotonic() - began < 5, "at this rate it takes half an hour"
    assert (server.seen, counters()["retries"] - retries) == (2, 1)
    (line,) = caplog.messages
    assert line.startswith("s3://bucket/x.tar: ")
    assert line.endswith("less than 400 KiB/s; asking again")


@WAYS
def test_a_server_that_only_trickles_is_told(server: Server, environment: dict[str, str], way: str) -> None:
    store = open_store("s3://bucket", environment | {RETRY: "0.3"})
    prepare(store, server, way, *[0.05] * 9)
    with pytest.raises(StorageError, match=r"too slow with s3://bucket/x\.tar .* bytes came within \d s") as told:
        read(store, way)
    assert RATE in told.value.remedy
    assert server.seen == s3_client._SLOW_TRIES, "one attempt takes as long as other faults are waited for"


@WAYS
def test_who_is_slow_and_steady_has_its_time(
    server: Server, environment: dict[str, str], way: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store("s3://bucket", environment | {RATE: "20"})
    prepare(store, server, way, 0.08)
    server.piece_bytes = len(DATA) // 9
    began = time.monotonic()
    assert read(store, way) == DATA
    assert time.monotonic() - began > 0.6
    assert server.seen == 1
    assert not caplog.messages


def test_waiting_for_a_connection_is_not_the_servers_time(
    server: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_client, "_MAX_CONNECTIONS", 1)
    store = open_store("s3://bucket", environment | {RATE: "100"})
    prepare(store, server, "direct", *[0.1] * 9)
    server.piece_bytes = len(DATA) // 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(store, "direct"), range(4))) == [DATA] * 4
    assert server.seen == 4
    assert not caplog.messages


def test_a_server_that_takes_no_bytes_is_told(server: Server, environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        store = open_store("s3://bucket", environment | {"AWS_ENDPOINT_URL": address, RATE: "1e6", RETRY: "0.1"})
        with pytest.raises(
            StorageError, match=r"s3://bucket/x .*30000000 bytes were not taken within \d s, less than 1e"
        ):
            store.write("x", bytes(30_000_000))


@WAYS
@pytest.mark.parametrize("piece_bytes", [1, 30_000], ids=["at the beginning", "in the midst"])
def test_several_connections_that_were_dropped_are_passed_over(
    server: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, way: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(s3_pace, "_MOST_SILENCE_SECONDS", 0.2)
    store = open_store("s3://bucket", environment | {RETRY: "8", RATE: "0"})
    prepare(store, server, way, 9, 9)
    server.piece_bytes = piece_bytes
    began = time.monotonic()
    assert read(store, way) == DATA
    assert server.seen == 3
    assert time.monotonic() - began < 8, "a connection that was dropped is waited for no longer than silence is borne"


def test_listings_may_take_longer_than_objects(server: Server, environment: dict[str, str]) -> None:
    store = open_store("s3://bucket", environment | {RETRY: "4"})
    server.pauses = iter([1.4])
    assert store.list() == []
    assert server.seen == 1


def test_what_a_proxy_changes_is_told_with_its_file(environment: dict[str, str]) -> None:
    changed = Answer(200, DATA, {"x-amz-checksum-crc32": "AAAAAA=="})
    with canned_s3(lambda _: changed) as server:
        store = open_store("s3://bucket", environment | server | {RETRY: "0.1"})
        with pytest.raises(StorageError, match=r"s3://bucket/manifest\.json .* cut or changed \(Flexible") as told:
            store.read("manifest.json")
    assert "proxies" in told.value.remedy


def test_the_limits_as_they_are() -> None:
    usual = pace({})
    assert usual == Pace(60, 16 * 1024, give_up_seconds=60)
    assert (usual.silence_seconds, usual.working_seconds) == (15, 30)
    assert usual.seconds("get_object", 4 << 20) == 30 + 256
    assert usual.seconds("upload_part", 32 << 20) == 30 + 2048
    assert usual.seconds("complete_multipart_upload", 0) == 600
    hasty = pace({GIVE_UP_VARIABLE: "5"})
    assert (hasty.give_up_seconds, hasty.silence_seconds) == (5, 15)
    patient = pace({RETRY: "600", RATE: "0"})
    assert (patient.silence_seconds, patient.working_seconds) == (60, 60)
    assert patient.seconds("get_object", 1) is None


@pytest.mark.parametrize(("name", "said"), [*itertools.product([RETRY, RATE], ["", "soon", "-1", "inf", "nan"])])
def test_limits_that_are_none_are_refused(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, said)
    with pytest.raises(ConfigError, match=f"{name}='{said}' is not a number of"):
        pace({})


def test_what_aiohttp_leaves_behind_when_a_connection_breaks_is_nobodys_business(caplog):
    client = s3_client.S3Client(Pace(1.0, 1.0, give_up_seconds=1.0), {})

    async def write() -> None:
        raise ConnectionResetError("Cannot write to closing transport")

    async def nobody_asks() -> None:
        task = asyncio.ensure_future(write())
        await asyncio.sleep(0.01)
        del task
        gc.collect()

    with caplog.at_level(logging.DEBUG, "lathe.storage"):
        asyncio.run_coroutine_threadsafe(nobody_asks(), client._loop).result(timeout=5)
        client.close()
    assert [r.levelno for r in caplog.records if "never retrieved" in r.getMessage()] == [logging.DEBUG]
