"""Ranges of objects, asked for beside botocore's machinery.

Between a call and its request, and between an answer and what it returns, botocore runs 2 ms of Python: rules of
endpoints, hooks, parsed headers. A block of latents comes in less. Here the first request for an object goes the usual
way and shows its address and what it was signed for; those that follow are signed by botocore's signer and sent by
aiobotocore's session, so that keys, proxies, certificates and time-outs are those of all requests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any

import aiohttp
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

from pipeline.storage.s3_errors import Kind, S3Error, passes, without_secrets
from pipeline.storage.s3_pace import Deadline

_log = logging.getLogger("lathe.storage")
_ADDRESSES_KEPT = 65_536
_REFUSALS = 3  # in a row, of what the usual way was granted: then nothing is asked for directly any more
_PIECE_BYTES = 1 << 20  # at a time, of what comes the usual way
_NO_END = 1 << 63  # beyond any object's
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)
_SCOPE = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d+/([^/]+)/s3/aws4_request\b")
_sent: ContextVar[list[tuple[str, str]]] = ContextVar("lathe_s3_sent")  # URL and signature of what a task sends


@dataclass(frozen=True)
class _Address:
    """Where an object is."""

    url: str
    region: str | None  # that requests are signed for; None = they are not signed


class RangeReader:
    """Reads ranges for one client, on its event loop.

    Args:
        client: aiobotocore's, for S3.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._addresses: dict[tuple[str, str], _Address] = {}
        self._refusals = 0
        self._cuts = False
        client.meta.events.register("before-send.s3.GetObject", _note_sent)

    @cached_property
    def _send(self) -> Any:
        return self._client._endpoint.http_session.send

    def knows(self, bucket: str, key: str) -> bool:
        """Whether ranges of this object can be read directly."""
        return (bucket, key) in self._addresses and self._refusals < _REFUSALS

    async def read(self, bucket: str, key: str, byte_range: str, deadline: Deadline) -> bytes | None:
        """The bytes of a range of an object that is known.

        Returns:
            None where the server refuses: the usual way tells why, and may be granted it.

        Raises:
            S3Error: Kind.TRANSIENT where the server is busy; Kind.GARBLED where it sends another range, or less of it.
            HTTPClientError, aiohttp.ClientError: of the network. The next attempt after an answer that cannot be used
                goes the usual way.
        """
        address = self._addresses[bucket, key]
        request = AWSRequest("GET", address.url, headers={"Range": byte_range}, stream_output=True)
        if address.region is not None:
            credentials = await self._client._request_signer._credentials.get_frozen_credentials()
            S3SigV4Auth(credentials, "s3", address.region).add_auth(request)
        answer: aiohttp.ClientResponse = (await self._send(request.prepare())).raw
        data = None
        try:
            async with answer:
                data = await self._received(answer, byte_range, deadline)
        finally:
            if data is None:
                self._addresses.pop((bucket, key), None)
            else:
                self._refusals = 0
        return data

    async def content(self, answer: dict[str, Any], byte_range: str | None, deadline: Deadline) -> bytes:
        """What botocore's answer brings: the range, where one was asked for.

        Raises:
            S3Error: Kind.GARBLED where it is another range, or less of it.
            BotoCoreError, aiohttp.ClientError: of the network.
        """
        body, told = answer["Body"], answer.get("ContentRange", "")
        async with body:
            if byte_range is None:
                return b"".join([piece async for piece in _pieces(body, deadline)])
            if answer["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.OK and not told:
                return await self._cut(body, byte_range, deadline)
            return _checked(b"".join([piece async for piece in _pieces(body, deadline)]), told, byte_range)

    def watch(self) -> None:
        """Note what this task sends from now on, for `learn`."""
        _sent.set([])

    def learn(self, bucket: str, key: str, *, refused: bool) -> None:
        """An object was read the usual way.

        Args:
            bucket: its name.
            key: of the object.
            refused: `read` gave None just before.
        """
        self._refusals += refused
        url, signature = sent[-1] if (sent := _sent.get([])) else ("", "")
        scope = _SCOPE.match(signature)
        if url and "?" not in url and (scope or not signature):
            while len(self._addresses) >= _ADDRESSES_KEPT:
                del self._addresses[next(iter(self._addresses))]
            self._addresses[bucket, key] = _Address(url, scope.group(1) if scope else None)

    async def _received(self, answer: aiohttp.ClientResponse, byte_range: str, deadline: Deadline) -> bytes | None:
        """The range in an answer to `read`; None where it is refused."""
        if passes(answer.status):
            raise S3Error(Kind.TRANSIENT, without_secrets(f"{answer.status} {answer.reason}"), answered=True)
        if answer.status not in (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.OK):
            return None
        told = answer.headers.get("Content-Range", "")
        if answer.status == HTTPStatus.OK and not told:
            return await self._cut(answer.content, byte_range, deadline)
        # One joint: aiohttp's own read() copies the pieces twice.
        data = b"".join([deadline.came(piece) async for piece, _ in answer.content.iter_chunks()])
        return _checked(data, told, byte_range)

    async def _cut(self, body: Any, byte_range: str, deadline: Deadline) -> bytes:
        """A range out of a whole object, which is read no further than that; warns once."""
        if not self._cuts:
            self._cuts = True
            server = without_secrets(self._client.meta.endpoint_url)
            _log.warning("S3 at %s sends whole objects where ranges are asked for: that is slow", server)
        first, last = _bounds(byte_range)
        at, kept = 0, []
        async for piece in _pieces(body, deadline):
            kept.append(piece[max(0, first - at) : last + 1 - at])
            at += len(piece)
            if at > last:
                break
        return b"".join(kept)


async def _pieces(body: Any, deadline: Deadline) -> AsyncIterator[bytes]:
    """A body as it comes; one that is longer than was asked for has its time."""
    while piece := await body.read(_PIECE_BYTES):
        yield deadline.came(piece)


def _bounds(byte_range: str) -> tuple[int, int]:
    """First and last byte of `bytes=FIRST-LAST` or `bytes=FIRST-`."""
    first, _, last = byte_range.removeprefix("bytes=").partition("-")
    return int(first), int(last or _NO_END)


def _checked(data: bytes, told: str, byte_range: str) -> bytes:
    """The data of an answer whose Content-Range is `told`, as far as this is what was asked for.

    Raises:
        S3Error: Kind.GARBLED: it is another range, or ends before this one and the object do.
    """
    (first, last), found = _bounds(byte_range), _CONTENT_RANGE.fullmatch(told)
    if found is not None:
        begin, end = int(found[1]), int(found[2])
        whole = end == last or (end < last and found[3] == str(end + 1))
        if whole and begin == first and len(data) == end + 1 - begin:
            return data
    said = f"{len(data)} bytes with Content-Range {told or 'missing'!r} in answer to {byte_range!r}"
    raise S3Error(Kind.GARBLED, without_secrets(said), answered=True)


def _note_sent(request: Any, **_: Any) -> None:
    signature = request.headers.get("Authorization", b"")
    _sent.get([]).append((request.url, signature.decode() if isinstance(signature, bytes) else signature))
