"""Ranges of objects, asked for beside botocore's machinery.

Between a call and its request, and between an answer and what it returns, botocore runs 2 ms of Python: rules of
endpoints, hooks, parsed headers. A block of latents comes in less. Here the first request for an object goes the usual
way and shows its address and what it was signed for; those that follow are signed by botocore's signer and sent by
aiobotocore's session, so that keys, proxies, certificates and time-outs are those of all requests.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any

import aiohttp
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

_ADDRESSES_KEPT = 65_536
_REFUSALS = 3  # in a row, of what the usual way was granted: then nothing is asked for directly any more
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
        client.meta.events.register("before-send.s3.GetObject", _note_sent)

    @cached_property
    def _send(self) -> Any:
        return self._client._endpoint.http_session.send

    def knows(self, bucket: str, key: str) -> bool:
        """Whether ranges of this object can be read directly."""
        return (bucket, key) in self._addresses and self._refusals < _REFUSALS

    async def read(self, bucket: str, key: str, byte_range: str) -> bytes | None:
        """The bytes of a range of an object that is known.

        Returns:
            None where the server does not send just that: the usual way tells why, and may be granted it.

        Raises:
            HTTPClientError, aiohttp.ClientError: of the network.
        """
        address = self._addresses[bucket, key]
        request = AWSRequest("GET", address.url, headers={"Range": byte_range}, stream_output=True)
        if address.region is not None:
            credentials = await self._client._request_signer._credentials.get_frozen_credentials()
            S3SigV4Auth(credentials, "s3", address.region).add_auth(request)
        answer: aiohttp.ClientResponse = (await self._send(request.prepare())).raw
        async with answer:
            if answer.status != HTTPStatus.PARTIAL_CONTENT:
                self._addresses.pop((bucket, key), None)
                return None
            # One joint: aiohttp's own read() copies the pieces twice.
            data = b"".join([piece async for piece, _ in answer.content.iter_chunks()])
        self._refusals = 0
        return data

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


def _note_sent(request: Any, **_: Any) -> None:
    signature = request.headers.get("Authorization", b"")
    _sent.get([]).append((request.url, signature.decode() if isinstance(signature, bytes) else signature))
