"""A store under a prefix of an S3 bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.storage.base import Entry, checked_name, checked_prefix, checked_range
from pipeline.storage.local import atomic_file, translated
from pipeline.storage.s3_client import S3Client, client
from pipeline.storage.s3_errors import Kind, S3Error, explain

PART_BYTES = 32 * 2**20  # larger files travel in parts of this size, at least
_MAX_PARTS = 10_000  # S3's own limit
_PARTS_AT_ONCE = 4
_DELETE_AT_ONCE = 1000  # S3's own limit
_ABANDONED_AFTER = timedelta(days=1)
_ABSENT = {"IfNoneMatch": "*"}


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
        key = self._key(name)
        head = self._head(key)
        size, same = int(head["ContentLength"]), {"IfMatch": head["ETag"]}
        with translated(local), atomic_file(local) as file, ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            descriptor = file.fileno()

            def fetch(first: int) -> None:
                last = min(first + PART_BYTES, size) - 1
                data = self._checked("get_object", key, Range=f"bytes={first}-{last}", **same)["Body"]
                with memoryview(data) as view:
                    done = 0
                    while done < len(view):
                        done += os.pwrite(descriptor, view[done:], first + done)

            _all(pool, fetch, range(0, size, PART_BYTES))

    def list(self, prefix: str = "") -> list[Entry]:
        """See Store.list."""
        wanted: dict[str, Any] = {"Prefix": self._root + checked_prefix(prefix)}
        entries = []
        while True:
            page = self._checked("list_objects_v2", "", **wanted)
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(self._root)
                if name and not name.endswith("/"):  # some tools make empty objects for folders
                    entries.append(Entry(name, int(item["Size"])))
            if not page.get("IsTruncated"):
                return sorted(entries)
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

    def _put(self, key: str, size: int, part: Callable[[int, int], bytes], condition: dict[str, str]) -> bool:
        """Store `size` bytes that `part(start, end)` gives. False: the condition does not hold."""
        try:
            if size > PART_BYTES:
                self._put_parts(key, size, part, condition)
            else:
                self._call("put_object", key, Body=part(0, size), **condition)
        except S3Error as fault:
            if fault.kind is not Kind.CONDITION or not condition:
                raise self._explained(fault, key) from fault
            # An attempt whose answer was lost may have been the one that wrote it.
            return fault.attempts > 1 and self._holds(key, size, part)
        return True

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes], condition: dict[str, str]) -> None:
        self._abort_abandoned(key)
        upload = {"UploadId": self._call("create_multipart_upload", key)["UploadId"]}
        length = max(PART_BYTES, -(-size // _MAX_PARTS))

        def send(first: int) -> dict[str, Any]:
            number = first // length + 1
            body = part(first, min(first + length, size))
            return {
                "PartNumber": number,
                "ETag": self._call("upload_part", key, PartNumber=number, Body=body, **upload)["ETag"],
            }

        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = _all(pool, send, range(0, size, length))
            self._call("complete_multipart_upload", key, MultipartUpload={"Parts": parts}, **upload, **condition)
        except BaseException:
            self._abort(key, upload["UploadId"])
            raise

    def _abort_abandoned(self, key: str) -> None:
        """Uploads of this very key that a killed process left: their parts take room and no listing shows them."""
        uploads = self._call("list_multipart_uploads", "", Prefix=key).get("Uploads", [])
        for upload in uploads:
            if upload["Key"] == key and datetime.now(UTC) - upload["Initiated"] > _ABANDONED_AFTER:
                self._abort(key, upload["UploadId"])

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", key, UploadId=upload)
        except (S3Error, StorageError):
            return  # it is gone, or the server is: the next upload of this key looks again

    def _holds(self, key: str, size: int, part: Callable[[int, int], bytes]) -> bool:
        if int(self._head(key)["ContentLength"]) != size:
            return False
        starts = range(0, size, PART_BYTES)
        return all(
            self._checked("get_object", key, Range=f"bytes={a}-{min(a + PART_BYTES, size) - 1}")["Body"]
            == part(a, min(a + PART_BYTES, size))
            for a in starts
        )

    def _head(self, key: str) -> dict[str, Any]:
        try:
            return self._call("head_object", key)
        except S3Error as fault:
            if fault.kind is Kind.NO_OBJECT:
                self._check_bucket()  # the answer to HEAD has no body to tell the two apart
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


def _all(pool: ThreadPoolExecutor, task: Callable[[int], Any], starts: range) -> list[Any]:
    """Results in order; after a failure, the tasks that have not begun are dropped."""
    futures = [pool.submit(task, start) for start in starts]
    try:
        return [future.result() for future in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
