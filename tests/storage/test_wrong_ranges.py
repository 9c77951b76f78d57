"""Ranges that a server is too busy for, breaks off, or takes for others: whichever way they are asked for."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from canned_s3 import Answer, Request, canned_s3, part_of

from pipeline.errors import StorageError
from pipeline.storage import Store, counters, open_store, s3_client

DATA = bytes(range(256)) * 40
FIRST, END = 1000, 2000
RETRY = "LATHE_STORAGE_RETRY_SECONDS"
_numbers = itertools.count()


class Server:
    """Sends ranges of DATA, but `wrong` answers as long as there are any, to requests of one way or both."""

    def __init__(self) -> None:
        self.wrong: Iterator[Answer] = iter(())
        self.to = {"direct", "usual"}
        self.seen: list[str] = []
        self.times: list[float] = []

    def __call__(self, request: Request) -> Answer:
        way = "usual" if "otocore" in request.headers["User-Agent"] else "direct"
        self.seen.append(way)
        self.times.append(time.monotonic())
        found = next(self.wrong, None) if way in self.to else None
        return found or part_of(DATA, request)

    def spoil(self, *answers: Answer, to: str = "direct usual", always: bool = False) -> None:
        self.wrong, self.to = itertools.cycle(answers) if always else iter(answers), set(to.split())
        self.seen.clear()
        self.times.clear()


@pytest.fixture(scope="module")
def _served() -> Iterator[tuple[Server, dict[str, str]]]:
    server = Server()
    with canned_s3(server) as environment:
        yield server, environment


@pytest.fixture
def server(_served: tuple[Server, dict[str, str]]) -> Server:
    _served[0].spoil()
    return _served[0]


@pytest.fixture
def environment(_served: tuple[Server, dict[str, str]]) -> dict[str, str]:
    return _served[1]


@pytest.fixture
def store(server: Server, environment: dict[str, str]) -> Store:
    return open_store("s3://bucket", environment)


@pytest.fixture
def impatient(server: Server, environment: dict[str, str]) -> Store:
    """Gives up soon."""
    return open_store("s3://bucket", environment | {RETRY: "0.15"})


def name_for(store: Store, way: str) -> str:
    """An object that is read that way next."""
    name = f"{next(_numbers)}.tar"
    if way == "direct":
        assert store.read(name, 0, 5) == DATA[:5]
    return name


def sent(first: int, last: int, told: str | None, **headers: str | None) -> Answer:
    return Answer(206, DATA[first : last + 1], {"Content-Range": told, **headers})


def whole(**headers: str | None) -> Answer:
    return Answer(200, DATA, headers)


RIGHT = f"bytes {FIRST}-{END - 1}/{len(DATA)}"
ALL = str(END - FIRST)
BUSY = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
WAYS = pytest.mark.parametrize("way", ["direct", "usual"])
UNAVAILABLE = [Answer(500), Answer(502, b"<html>Bad gateway"), Answer(503, BUSY), Answer(429)]
WRONG = {
    "breaks off": sent(FIRST, END - 300, RIGHT, **{"Content-Length": ALL}),
    "breaks off at once": sent(FIRST, FIRST - 1, RIGHT, **{"Content-Length": ALL}),
    "breaks off without a length": sent(FIRST, END - 300, RIGHT, **{"Content-Length": None}),
    "less than it says": sent(FIRST, END - 300, RIGHT),
    "less than was asked for": sent(FIRST, END - 300, f"bytes {FIRST}-{END - 300}/{len(DATA)}"),
    "less, of unknown length": sent(FIRST, END - 300, f"bytes {FIRST}-{END - 300}/*"),
    "more than was asked for": sent(FIRST, END, f"bytes {FIRST}-{END}/{len(DATA)}"),
    "more than it says": sent(FIRST, END, RIGHT),
    "another beginning": sent(FIRST + 1, END - 1, f"bytes {FIRST + 1}-{END - 1}/{len(DATA)}"),
    "another range as long": sent(0, END - FIRST - 1, f"bytes 0-{END - FIRST - 1}/{len(DATA)}"),
    "another range to the end": sent(len(DATA) - 1000, len(DATA) - 1, f"bytes 9240-10239/{len(DATA)}"),
    "no Content-Range": sent(FIRST, END - 1, None),
    "another unit": sent(FIRST, END - 1, f"lines {FIRST}-{END - 1}/{len(DATA)}"),
    "an object that breaks off": Answer(200, DATA[: END - 300], {"Content-Length": str(len(DATA))}),
    "another range as if whole": Answer(200, DATA[:1000], {"Content-Range": f"bytes 0-999/{len(DATA)}"}),
}


@WAYS
@pytest.mark.parametrize("answer", UNAVAILABLE, ids=lambda answer: answer.status)
def test_a_busy_server_is_waited_for(server: Server, store: Store, way: str, answer: Answer) -> None:
    name = name_for(store, way)
    server.spoil(answer)
    before = counters()
    assert store.read(name, FIRST, END) == DATA[FIRST:END]
    assert server.seen == [way, "usual"]
    assert server.times[1] - server.times[0] > 0.09, "no second request to a busy server before some time has passed"
    now = counters()
    assert sum(now["requests"].values()) - sum(before["requests"].values()) == 2
    assert (now["retries"] - before["retries"], now["errors"]) == (1, before["errors"])
    assert store.read(name, FIRST, END) == DATA[FIRST:END]
    assert server.seen == [way, "usual", "direct"]


def test_ranges_are_read_directly_again_after_any_busy_time(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_MAX_DELAY_SECONDS", 0.0)
    name = name_for(store, "direct")
    for _ in range(6):
        server.spoil(Answer(503, BUSY), to="direct")
        assert store.read(name, FIRST, END) == DATA[FIRST:END]
        assert server.seen == ["direct", "usual"]


@WAYS
def test_a_server_that_stays_busy_is_told(server: Server, impatient: Store, way: str) -> None:
    name = name_for(impatient, way)
    server.spoil(Answer(503, BUSY), always=True)
    with pytest.raises(StorageError, match=rf"kept failing on s3://bucket/{name} for 0 s \(503 SlowDown: Reduce"):
        impatient.read(name, FIRST, END)
    assert len(server.seen) > 1


@WAYS
@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_what_is_not_the_range_is_asked_for_again(
    server: Server, store: Store, monkeypatch: pytest.MonkeyPatch, way: str, answer: Answer
) -> None:
    monkeypatch.setattr(s3_client, "_MAX_DELAY_SECONDS", 0.0)
    name = name_for(store, way)
    server.spoil(answer, answer)
    before = counters()["retries"]
    assert store.read(name, FIRST, END) == DATA[FIRST:END]
    assert len(server.seen) == 3
    assert counters()["retries"] - before == 2
    server.seen.clear()
    assert store.read(name, 1, 2) == DATA[1:2]
    assert server.seen == ["direct"]


@WAYS
@pytest.mark.parametrize("answer", [WRONG["breaks off"], WRONG["another range as long"]], ids=["cut", "another"])
def test_a_server_that_never_sends_the_range_is_told(
    server: Server, impatient: Store, way: str, answer: Answer
) -> None:
    name = name_for(impatient, way)
    server.spoil(answer, always=True)
    with pytest.raises(StorageError, match=rf"kept failing on s3://bucket/{name} .*(payload|0-999/10240)") as told:
        impatient.read(name, FIRST, END)
    assert "\n" not in told.value.message


@WAYS
@pytest.mark.parametrize(
    ("first", "end", "answer"),
    [
        (10_000, 20_000, sent(10_000, 10_239, "bytes 10000-10239/10240")),
        (10_000, None, sent(10_000, 10_239, "bytes 10000-10239/10240")),
        (FIRST, END, sent(FIRST, END - 1, f"bytes {FIRST}-{END - 1}/*")),
        (FIRST, END, sent(FIRST, END - 1, RIGHT, **{"Content-Length": None})),
    ],
)
def test_ranges_that_end_with_their_object_are_whole(
    server: Server, store: Store, way: str, first: int, end: int | None, answer: Answer
) -> None:
    name = name_for(store, way)
    server.spoil(answer)
    assert store.read(name, first, end) == DATA[first:end]
    assert server.seen == [way]


@WAYS
@pytest.mark.parametrize("answer", [whole(), whole(**{"Content-Length": None})], ids=["told", "not told"])
def test_ranges_are_cut_out_of_objects_that_come_whole(server: Server, store: Store, way: str, answer: Answer) -> None:
    name = name_for(store, way)
    server.spoil(answer, always=True)
    for first, end in [
        (FIRST, END),
        (0, 1),
        (0, 10_240),
        (10_239, 10_240),
        (9000, 99_999),
        (9000, None),
        (10_240, 10_250),
    ]:
        assert store.read(name, first, end) == DATA[first:end]
        assert server.seen.pop() == way
        way = "direct"


def test_files_and_downloads_are_cut_out_too(server: Server, store: Store, tmp_path: Path) -> None:
    server.spoil(whole(ETag='"e"'), always=True)
    file = store.open("x")
    assert file.size == len(DATA)
    assert file.read(FIRST, END) == DATA[FIRST:END]
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA


def test_objects_that_come_whole_are_read_no_further_than_needed(caplog: pytest.LogCaptureFixture) -> None:
    passed = 0

    def huge() -> Iterator[bytes]:
        nonlocal passed
        for number in range(256):
            passed += 1
            yield bytes([number]) * (1 << 20)

    with (
        canned_s3(lambda _: Answer(200, huge(), {"Content-Length": str(1 << 28)})) as environment,
        caplog.at_level(logging.WARNING, "lathe.storage"),
    ):
        store = open_store("s3://bucket", environment)
        for _ in range(3):
            assert store.read("x", (5 << 20) - 1, (5 << 20) + 1) == b"\4\5"
    assert 18 <= passed < 150, "with what network and buffers hold"
    assert len(caplog.messages) == 1
    assert "sends whole objects where ranges are asked for" in caplog.text


class Keys:
    """A server that gives out keys, as clusters have one, and notes what each request is signed with."""

    def __init__(self, *seconds: float) -> None:
        self.given, self.lifetimes = 0, list(seconds)
        self.signed: list[tuple[str, bool]] = []
        self.refused = 0

    def __call__(self, request: Request) -> Answer:
        if request.path == "/keys":
            self.given += 1
            end = datetime.now(UTC) + timedelta(seconds=self.lifetimes[min(self.given, len(self.lifetimes)) - 1])
            keys = {"AccessKeyId": f"key{self.given}", "SecretAccessKey": "s", "Token": f"token{self.given}"}
            return Answer(200, json.dumps(keys | {"Expiration": end.isoformat()}).encode())
        signed = f"Credential=key{self.given}/" in request.headers["Authorization"]
        newest = signed and request.headers["X-Amz-Security-Token"] == f"token{self.given}"
        self.signed.append(("usual" if "otocore" in request.headers["User-Agent"] else "direct", newest))
        if self.refused:
            self.refused -= 1
            return Answer(403, b"<Error><Code>ExpiredToken</Code><Message>The token has expired</Message></Error>")
        return part_of(DATA, request)


@contextmanager
def keys_from(server: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(variable, "/dev/null")
    with canned_s3(server) as environment:
        address = environment["AWS_ENDPOINT_URL"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{address}/keys")
        yield open_store("s3://bucket", {})


def test_ranges_are_signed_with_the_newest_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore renews keys that end within minutes, and keeps others."""
    server = Keys(60, 60, 60, 60, 7200)
    with keys_from(server, monkeypatch) as store:
        for first in range(8):
            assert store.read("x", first, 20) == DATA[first:20]
    assert server.signed == [("usual", True)] + [("direct", True)] * 7
    assert server.given == 5


def test_keys_that_have_ended_are_told_or_passed_over_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Keys(7200)
    with keys_from(server, monkeypatch) as store:
        for refused, ways in [(0, ["usual"]), (0, ["direct"]), (1, ["direct", "usual"]), (0, ["direct"])]:
            server.refused = refused
            server.signed.clear()
            assert store.read("x", 5, 20) == DATA[5:20]
            assert server.signed == [(way, True) for way in ways]
        server.refused = 2
        with pytest.raises(StorageError, match=r"refuses access to s3://bucket/x \(403 ExpiredToken: The token"):
            store.read("x", 5, 20)
