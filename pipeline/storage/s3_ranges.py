"""Ranges of objects, asked for beside botocore's machinery.

Between a call and its request, and between an answer and what it returns, botocore runs 2 ms of Python: rules of
endpoints, hooks, parsed headers. A block of latents comes in less. Here botocore tells each object's address once, its
signer signs, and aiobotocore's session sends: keys, proxies, certificates and time-outs are those of all requests.
"""

from __future__ import annotations

from collections import OrderedDict
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError

_ADDRESSES_KEPT = 4096
_PLAIN_ALGORITHM = "AWS4-HMAC-SHA256"


class RangeReader:
    """Reads ranges for one client, on its event loop."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[tuple[str, str], tuple[str, str | None]] = OrderedDict()
        self._given_up = False

    def give_up(self) -> None:
        """Read nothing more: what this was refused, the usual way was granted."""
        self._given_up = True

    async def read(self, client: Any, bucket: str, key: str, byte_range: str) -> bytes | None:
        """The bytes of a range.

        Args:
            client: aiobotocore's, for S3.
            bucket: its name.
            key: of the object.
            byte_range: as HTTP's header has it.

        Returns:
            None where the usual way must be gone, because it must be signed otherwise or the server refuses: then that
            tells the reason.

        Raises:
            ClientError: the server fails for now.
            HTTPClientError, aiohttp.ClientError: of the network.
        """
        address = None if self._given_up else await self._address(client, bucket, key)
        if address is None:
            return None
        url, region = address
        request = AWSRequest("GET", url, headers={"Range": byte_range}, stream_output=True)
        if region is not None:
            credentials = await client._request_signer._credentials.get_frozen_credentials()
            S3SigV4Auth(credentials, "s3", region).add_auth(request)
        sent: aiohttp.ClientResponse = (await client._endpoint.http_session.send(request.prepare())).raw
        async with sent as answer:
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS or answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                said = {"Error": {"Code": str(answer.status), "Message": answer.reason or ""}}
                raise ClientError({**said, "ResponseMetadata": {"HTTPStatusCode": answer.status}}, "GetObject")
            if answer.status != HTTPStatus.PARTIAL_CONTENT:
                return None
            # One joint: aiohttp's own read() copies the pieces twice.
            return b"".join([piece async for piece, _ in answer.content.iter_chunks()])

    async def _address(self, client: Any, bucket: str, key: str) -> tuple[str, str | None] | None:
        """An object's URL, and the region to sign for (None = not at all); None where the signature is another one."""
        known = self._addresses.get((bucket, key))
        if known is None:
            signed = await client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
            parts = urlsplit(signed)
            query = parse_qs(parts.query)
            if query.keys() & {"X-Amz-S3session-Token"} or query.get("X-Amz-Algorithm", [_PLAIN_ALGORITHM]) != [
                _PLAIN_ALGORITHM
            ]:
                self.give_up()
                return None
            region = client.meta.region_name or "us-east-1" if query else None
            if "X-Amz-Credential" in query:
                region = query["X-Amz-Credential"][0].split("/")[2]
            known = self._addresses[bucket, key] = parts._replace(query="").geturl(), region
            while len(self._addresses) > _ADDRESSES_KEPT:
                self._addresses.popitem(last=False)
        return known
