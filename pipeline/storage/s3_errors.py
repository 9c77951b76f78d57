"""What S3's errors mean: which pass by themselves, and which sentence tells the user about the others."""

from __future__ import annotations

import asyncio
import enum
import os
from typing import Any

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from pipeline.console import without_logins
from pipeline.errors import StorageError

RATE_VARIABLE = "LATHE_STORAGE_MIN_KIB_PER_SECOND"


class Kind(enum.Enum):
    """What can be done about a fault."""

    TRANSIENT = "try again"
    GARBLED = "it came cut or changed"
    SLOW = "it came too slowly"
    NO_BUCKET = "the bucket is not there"
    NO_OBJECT = "the object is not there"
    NO_UPLOAD = "the unfinished upload is not there"
    FORBIDDEN = "keys or rights"
    NO_KEYS = "no keys were found"
    CONDITION = "a condition of the request does not hold"
    RANGE = "the range begins beyond the end"
    OTHER = "refused"


PASSING = (Kind.TRANSIENT, Kind.GARBLED, Kind.SLOW)
"""Faults after which a request is made again."""


class S3Error(Exception):
    """A request that failed: its kind, and what was said, as a phrase without secrets.

    `answered` tells a server that refuses from one that is silent; `attempts` counts the requests made.
    """

    def __init__(self, kind: Kind, said: str, *, answered: bool) -> None:
        super().__init__(said)
        self.kind = kind
        self.said = said
        self.answered = answered
        self.attempts = 1


# Answers cut short, or garbled by a proxy.
_GARBLED = (
    ResponseParserError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    aiohttp.ClientPayloadError,
)
# Refused or dropped connections, time-outs.
_PASSING = (
    boto.HTTPClientError,
    boto.ConnectionError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
    TimeoutError,
)
_PASSING_CODES = {
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "Throttling",
    "SlowDown",
    "BadDigest",
}
_KEYS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound)
_KINDS = {
    "NoSuchBucket": Kind.NO_BUCKET,
    "NoSuchKey": Kind.NO_OBJECT,
    "NoSuchUpload": Kind.NO_UPLOAD,
    "PreconditionFailed": Kind.CONDITION,
    "InvalidRange": Kind.RANGE,
}
_KINDS_BY_STATUS = {
    401: Kind.FORBIDDEN,
    403: Kind.FORBIDDEN,
    404: Kind.NO_OBJECT,
    412: Kind.CONDITION,
    416: Kind.RANGE,
}


def fault_of(error: BaseException) -> S3Error:
    """Classify what s3fs, aiobotocore or the network raised."""
    refusal = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(refusal, boto.ClientError):
        return _refusal(refusal.response)
    said = without_secrets(f"{type(error).__name__}: {error}")
    if isinstance(error, boto.SSLError):
        return S3Error(Kind.OTHER, said, answered=True)
    if isinstance(error, _KEYS):
        return S3Error(Kind.NO_KEYS, said, answered=False)
    if isinstance(error, _GARBLED):
        return S3Error(Kind.GARBLED, said, answered=True)
    if isinstance(error, _PASSING):
        return S3Error(Kind.TRANSIENT, said, answered=False)
    if isinstance(error, boto.BotoCoreError | ValueError | OSError):
        return S3Error(Kind.OTHER, said, answered=False)
    raise error


def _refusal(response: dict[str, Any]) -> S3Error:
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", status))
    message = str(response.get("Error", {}).get("Message", ""))
    if code in _PASSING_CODES or passes(status):
        kind = Kind.TRANSIENT
    else:
        kind = _KINDS.get(code) or _KINDS_BY_STATUS.get(status) or Kind.OTHER
    named = f"{status} {code}" if code != str(status) else code  # the answer to HEAD has a number alone
    return S3Error(kind, without_secrets(f"{named}: {message}".rstrip(": ")), answered=True)


def passes(status: int) -> bool:
    """Whether what was answered with this HTTP status may be granted a little later."""
    return status == 429 or (status >= 500 and status != 501)


def without_secrets(text: str) -> str:
    """One line of text, without the values of the key variables and without passwords in addresses."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if value := os.environ.get(name):
            text = text.replace(value, f"${name}")
    return " ".join(without_logins(text).split())[:300]


def explain(fault: S3Error, endpoint: str, bucket: str, key: str, waited: float) -> StorageError:
    """The sentence and the remedy for a fault."""
    place = f"s3://{bucket}/{key}".rstrip("/")
    server = f"S3 at {endpoint}"
    match fault.kind:
        case Kind.NO_BUCKET:
            message = f"bucket {bucket!r} does not exist on {server}"
            remedy = "create it, or check its name and AWS_ENDPOINT_URL"
        case Kind.NO_OBJECT:
            message, remedy = f"{place}: no such object on {server}", "check the address"
        case Kind.NO_UPLOAD:
            message = f"{place}: another process cleared its upload again and again"
            remedy = "end the other jobs that write to the same output, then run the same command again"
        case Kind.FORBIDDEN:
            message = f"{server} refuses access to {place} ({fault.said})"
            remedy = (
                "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the profile), and their rights on the bucket"
            )
        case Kind.NO_KEYS:
            message = f"no S3 keys found for {place} ({fault.said})"
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        case Kind.GARBLED:
            message = f"{server} kept failing on {place} for {waited:.0f} s: it came cut or changed ({fault.said})"
            remedy = "look at the proxies in between and the server's log, then run the same command again"
        case Kind.SLOW:
            message = f"{server} kept being too slow with {place} for {waited:.0f} s ({fault.said})"
            remedy = f"look at the server and the network; where they are as slow as that, set a lower {RATE_VARIABLE}"
        case Kind.TRANSIENT if fault.answered:
            message = f"{server} kept failing on {place} for {waited:.0f} s ({fault.said})"
            remedy = "look at the server's log and its free disk space, then run the same command again"
        case Kind.TRANSIENT:
            message = f"{server} did not answer for {waited:.0f} s ({fault.said})"
            remedy = "start the server or check AWS_ENDPOINT_URL and the network, then run the same command again"
        case _:
            message = f"{server} refuses {place} ({fault.said})"
            remedy = "check the address and the bucket's settings"
    return StorageError(message, remedy)
