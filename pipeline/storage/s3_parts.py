"""Large objects in parts: sent, begun anew where somebody swept them, cleared where a writer was killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.errors import ConfigError, StorageError
from pipeline.storage.s3_errors import Kind, S3Error

# method, key, arguments -> botocore's answer; raises S3Error and StorageError as S3Client.call does
Call = Callable[..., dict[str, Any]]
# start, end -> these bytes of what is sent
Part = Callable[[int, int], bytes]

_PART_VARIABLE = "LATHE_S3_PART_MIB"
_LEAST_PART_MIB = 5  # S3's own limits
_MOST_PART_MIB = 5120
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 4
_ANEW = 3


@dataclass(frozen=True)
class Unfinished:
    """A multipart upload that has not been completed. No listing of objects shows it, but its parts take room."""

    key: str
    upload: str
    begun: datetime


def part_bytes() -> int:
    """Larger files travel in parts of this size: LATHE_S3_PART_MIB, 32 MiB by default.

    Raises:
        ConfigError: it is no whole number that S3 takes.
    """
    said = os.environ.get(_PART_VARIABLE, "32")
    if not (said.isascii() and said.isdigit() and _LEAST_PART_MIB <= int(said) <= _MOST_PART_MIB):
        raise ConfigError(
            f"{_PART_VARIABLE}={said!r} is not a whole number of MiB from {_LEAST_PART_MIB} to {_MOST_PART_MIB}",
            f"write {_PART_VARIABLE}=32",
        )
    return int(said) * 2**20


def send(call: Call, key: str, size: int, part: Part, condition: dict[str, str]) -> None:
    """Upload an object in parts, and clear what killed writers left of the same key.

    Where another writer clears ours meanwhile, it begins anew, unless the object is there with the same bytes.
    """
    for tries_left in reversed(range(1 + _ANEW)):
        try:
            _send_once(call, key, size, part, condition)
        except S3Error as fault:
            if fault.kind is not Kind.NO_UPLOAD:
                raise
            # Under a condition, only an answer that was lost can mean that it was we who wrote the object.
            if (not condition or fault.attempts > 1) and holds(call, key, size, part):
                break
            if not tries_left:
                raise
        else:
            break
    with suppress(S3Error, StorageError):  # the object is whole, and a sweep looks again
        for left in unfinished(call, key):
            if left.key == key:
                abort(call, left)


def holds(call: Call, key: str, size: int, part: Part) -> bool:
    """Whether the object is there with just these bytes."""
    length = part_bytes()
    try:
        head = call("head_object", key)
        return int(head["ContentLength"]) == size and all(
            get_range(call, key, start, min(start + length, size), head["ETag"])
            == part(start, min(start + length, size))
            for start in range(0, size, length)
        )
    except S3Error:
        return False  # it is gone, or another by now


def get_range(call: Call, key: str, start: int, end: int, tag: str) -> bytes:
    """The bytes `start:end` of an object whose ETag is still `tag`.

    Raises:
        S3Error: Kind.CONDITION where it is another by now.
    """
    answer = call("get_object", key, Range=f"bytes={start}-{end - 1}", IfMatch=tag)
    body = bytes(answer["Body"])
    if answer.get("ETag", tag) != tag or len(body) != end - start:  # a server or cache without conditions
        raise S3Error(Kind.CONDITION, "the object has changed", answered=True)
    return body


def unfinished(call: Call, prefix: str) -> Iterator[Unfinished]:
    """Every unfinished upload whose key begins with `prefix`."""
    wanted: dict[str, Any] = {"Prefix": prefix}
    while True:
        page = call("list_multipart_uploads", "", **wanted)
        for item in page.get("Uploads", []):
            yield Unfinished(item["Key"], item["UploadId"], item["Initiated"])
        marks = {name: page.get(f"Next{name}") for name in ("KeyMarker", "UploadIdMarker")}
        if not page.get("IsTruncated") or not any(marks.values()):
            return
        wanted.update({name: mark for name, mark in marks.items() if mark})  # some servers give only one


def abort(call: Call, left: Unfinished) -> None:
    """Drop an unfinished upload; one that is gone already is passed over."""
    try:
        call("abort_multipart_upload", left.key, UploadId=left.upload)
    except S3Error as fault:
        if fault.kind not in (Kind.NO_UPLOAD, Kind.NO_OBJECT):
            raise


def in_parts(task: Callable[[int], Any], starts: range) -> list[Any]:
    """Results of several tasks at once, in order; after a failure, those that have not begun are dropped."""
    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        futures = [pool.submit(task, start) for start in starts]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _send_once(call: Call, key: str, size: int, part: Part, condition: dict[str, str]) -> None:
    upload = {"UploadId": call("create_multipart_upload", key)["UploadId"]}
    length = max(part_bytes(), -(-size // _MAX_PARTS))

    def send_part(first: int) -> dict[str, Any]:
        number = first // length + 1
        body = part(first, min(first + length, size))
        return {"PartNumber": number, "ETag": call("upload_part", key, PartNumber=number, Body=body, **upload)["ETag"]}

    try:
        parts = in_parts(send_part, range(0, size, length))
        call("complete_multipart_upload", key, MultipartUpload={"Parts": parts}, **upload, **condition)
    except BaseException:
        with suppress(S3Error, StorageError):  # the server may be gone: a sweep looks again
            call("abort_multipart_upload", key, UploadId=upload["UploadId"])
        raise
