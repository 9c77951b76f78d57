"""A store under a prefix of an S3 bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import StorageError
from pipeline.storage import s3_parts
from pipeline.storage.base import Entry, changed, checked_name, checked_prefix, checked_range
from pipeline.storage.local import translated
from pipeline.storage.s3_client import S3Client, client
from pipeline.storage.s3_errors import Kind, S3Error, explain
from pipeline.storage.whole_file import write_whole

_DELETE_AT_ONCE = 1000  # S3's own limit
_ABSENT = {"IfNoneMatch": "*"}


class S3File:
    """See base.OpenFile: every range is asked for by the ETag that the object had at first."""

    def __init__(self, store: S3Store, key: str) -> None:
        head = store.head(key)
        self.size = int(head["ContentLength"])
        self.version = str(head["ETag"]).strip('"')
        self._store, self._key, self._tag = store, key, str(head["ETag"])

    def read(self, start: int, end: int) -> bytes:
        """See OpenFile.read."""
        end = min(end, self.size)
        return self._store.read_version(self._key, start, end, self._tag) if start < end else b""

    def close(self) -> None:
        """See OpenFile.close: nothing is held open."""


class S3Store:
    """A prefix of a bucket. Requests are retried as the package says; nothing is cached."""

    def __init__(self, bucket: str, prefix: str, environment: Mapping[str, str]) -> None:
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._environment = environment
        self._bucket_seen = False

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """See Store.read."""
        key = self._key(name)
        first, end = checked_range(start, end)
        if end is not None and end == first:
            return b""
        wanted = {} if not first and end is None else {"Range": f"bytes={first}-{'' if end is None else end - 1}"}
        try:
            return bytes(self._call("get_object", key, **wanted)["Body"])
        except S3Error as fault:
            if fault.kind is Kind.RANGE:
                return b""
            raise self._explained(fault, key) from fault

    def write(self, name: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """See Store.write."""
        view = memoryview(data).cast("B")
        return self._put(self._key(name), len(view), lambda a, b: bytes(view[a:b]), _ABSENT if if_absent else {})

    def upload(self, local: Path, name: str) -> None:
        """See Store.upload."""
        key = self._key(name)
        with translated(local), local.open("rb") as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            self._put(key, size, lambda a, b: _read_exactly(local, descriptor, a, b), {})

    def download(self, name: str, local: Path) -> None:
        """See Store.download."""
        source, length = self.open(name), s3_parts.part_bytes()

        def fill(file: BinaryIO) -> None:
            def fetch(first: int) -> None:
                _write_at(file, source.read(first, first + length), first)

            s3_parts.in_parts(fetch, range(0, source.size, length))

        with translated(local):
            write_whole(local, fill)

    def open(self, name: str) -> S3File:
        """See Store.open."""
        return S3File(self, self._key(name))

    def list(
        self,
        prefix: str = "",
        *,
        into: Callable[[str], bool] | None = None,
        left_out: Callable[[str, str], object] | None = None,
    ) -> list[Entry]:
        """See Store.list."""
        entries = []
        prefixes = [self._root + checked_prefix(prefix)]
        while prefixes:
            for page in self._pages(prefixes.pop(), flat=into is not None):
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(self._root)
                    if name and not name.endswith("/"):  # some tools make empty objects for folders
                        entries.append(Entry(name, int(item["Size"]), str(item.get("ETag", "")).strip('"')))
                folders = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
                prefixes += [f for f in folders if into and into(f.removeprefix(self._root).rstrip("/"))]
        return sorted(entries)

    def _pages(self, prefix: str, *, flat: bool) -> Iterator[dict[str, Any]]:
        wanted = {"Prefix": prefix, **({"Delimiter": "/"} if flat else {})}
        while True:
            page = self._checked("list_objects_v2", "", **wanted)
            yield page
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def exists(self, name: str) -> bool:
        """See Store.exists."""
        try:
            self._call("head_object", self._key(name))
        except S3Error as fault:
            if fault.kind is not Kind.NO_OBJECT:
                raise self._explained(fault, self._key(name)) from fault
            self._check_bucket()
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """See Store.delete."""
        keys = [{"Key": self._key(name)} for name in names]
        for i in range(0, len(keys), _DELETE_AT_ONCE):
            batch = {"Objects": keys[i : i + _DELETE_AT_ONCE], "Quiet": True}
            left = self._checked("delete_objects", "", Delete=batch).get("Errors", [])
            if left:
                raise StorageError(
                    f"s3://{self._bucket}/{left[0]['Key']} and {len(left) - 1} more stay: {left[0].get('Code')}",
                    "check that the keys may delete in this bucket",
                )

    def leftovers(self) -> tuple[str, ...]:
        """See Store.leftovers."""
        found = s3_parts.unfinished(self._checked, self._root)
        return tuple(sorted(left.key.removeprefix(self._root) for left in found))

    def sweep(self, names: Iterable[str], older_than_seconds: float = 0.0) -> int:
        """See Store.sweep."""
        keys = {self._key(name) for name in names}
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        found = list(s3_parts.unfinished(self._checked, self._root) if keys else ())
        mine = [left for left in found if left.key in keys and (not older_than_seconds or left.begun < before)]
        for left in mine:
            try:
                s3_parts.abort(self._call, left)
            except S3Error as fault:
                raise self._explained(fault, left.key) from fault
        return len(mine)

    def seconds_ahead(self) -> float | None:
        """By how much the server's clock is ahead of this machine's; None = it tells no time. A refusal tells it too.

        Raises:
            StorageError: it does not answer.
        """
        clock = self._client.clock
        clock.forget()
        try:
            self._call("head_bucket", "")
        except S3Error:  # an answer
            pass
        except StorageError:
            if clock.seconds_ahead is None:
                raise
        return clock.seconds_ahead

    def _put(self, key: str, size: int, part: s3_parts.Part, condition: dict[str, str]) -> bool:
        """Store `size` bytes that `part(start, end)` gives. False: the condition does not hold."""
        try:
            if size > s3_parts.part_bytes():
                s3_parts.send(self._call, key, size, part, condition)
            else:
                self._call("put_object", key, Body=part(0, size), **condition)
        except S3Error as fault:
            if fault.kind is not Kind.CONDITION or not condition:
                raise self._explained(fault, key) from fault
            # An attempt whose answer was lost may have been the one that wrote it.
            return fault.attempts > 1 and s3_parts.holds(self._call, key, size, part)
        return True

    def head(self, key: str) -> dict[str, Any]:
        """What S3 says of an object, by its whole key."""
        try:
            return self._call("head_object", key)
        except S3Error as fault:
            if fault.kind is Kind.NO_OBJECT:
                self._check_bucket()  # the answer to HEAD has no body to tell the two apart
            raise self._explained(fault, key) from fault

    def read_version(self, key: str, start: int, end: int, tag: str) -> bytes:
        """The bytes `start:end` of an object, by its whole key. Raises StorageError unless its ETag is still `tag`."""
        try:
            return s3_parts.get_range(self._call, key, start, end, tag)
        except S3Error as fault:
            if fault.kind in (Kind.CONDITION, Kind.RANGE):
                raise changed(f"s3://{self._bucket}/{key}") from fault
            raise self._explained(fault, key) from fault

    def _check_bucket(self) -> None:
        if not self._bucket_seen:
            try:
                self._call("head_bucket", "")
            except S3Error as fault:
                raise self._explained(S3Error(Kind.NO_BUCKET, fault.said, answered=True), "") from fault

    def _checked(self, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._call(method, key, **arguments)
        except S3Error as fault:
            raise self._explained(fault, key) from fault

    def _call(self, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        answer = self._client.call(method, self._bucket, key, **arguments)
        self._bucket_seen = True
        return answer

    def _explained(self, fault: S3Error, key: str) -> StorageError:
        return explain(fault, self._client.endpoint, self._bucket, key, 0.0)

    def _key(self, name: str) -> str:
        return self._root + checked_name(name)

    @property
    def _client(self) -> S3Client:
        return client(self._environment)


def _read_exactly(local: Path, descriptor: int, first: int, end: int) -> bytes:
    data = os.pread(descriptor, end - first, first)
    while len(data) < end - first:
        more = os.pread(descriptor, end - first - len(data), first + len(data))
        if not more:
            raise StorageError(f"{local} shrank while it was uploaded", "do not change files that are being uploaded")
        data += more
    return data


def _write_at(file: BinaryIO, data: bytes, offset: int) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(file.fileno(), view[done:], offset + done)
