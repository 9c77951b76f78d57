"""Image and latent shards for a person, from their headers and first samples: they are not read as a whole."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np

from pipeline.data.manifest import RECEIPT_SUFFIX, load_receipt
from pipeline.data.samples import IMAGE_EXTENSIONS, split_name
from pipeline.data.tar import members_at
from pipeline.errors import DataError
from pipeline.operate.description import Description, Section, Size
from pipeline.operate.record_contents import receipt_facts
from pipeline.storage import Store

_WINDOW = 16 << 10  # bytes of one request: a header, and small members behind it
_MOST_REQUESTS = 400  # of one remote shard; local ones are read to their end
_MOST_PICTURE = 64 << 20
_MOST_TEXT = 64 << 10
_ARRAY_HEADER = 4 << 10
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")


class _EnoughError(Exception):
    """As many requests were made as one shard is worth."""


class _Ranges(io.RawIOBase):
    """A file of a store, read where somebody looks."""

    def __init__(self, store: Store, name: str, size: int, most: float = math.inf) -> None:
        self._store, self._name, self._size, self._most = store, name, size, most
        self._at = self._requests = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if self._at >= end:
            return 0
        self._requests += 1
        if self._requests > self._most:
            raise _EnoughError
        data = self._store.read(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass
class _Sample:
    """One of the first samples: its members' places, by extension."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size of the content


@dataclass
class _Contents:
    """What was seen of a shard."""

    first: list[_Sample] = field(default_factory=list)
    samples: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # members by kind
    sizes: Counter[str] = field(default_factory=Counter)
    at: int = 0  # bytes of the shard that were passed
    whole: bool = False


def describe_shard(store: Store, name: str, size: int, samples: int) -> Description:
    """A tar of pictures or latents: its first `samples` samples, and what all of it holds.

    Raises:
        DataError: it is no tar, a compressed one, or damaged before its end.
        StorageError: it cannot be read.
    """
    url = f"{store.url.rstrip('/')}/{name}"
    ranges = _open(store, name, size)
    if ranges.read(6).startswith(_COMPRESSED):
        raise DataError(
            f"{url} is compressed, and cannot be looked into", "unpack it; `lathe encode` reads it as it is"
        )
    has_receipt = store.exists(name + RECEIPT_SUFFIX)
    headers = _open(store, name, size, _MOST_REQUESTS if url.startswith("s3://") else math.inf)
    try:
        contents = _walk(headers, size, samples, to_the_end=not has_receipt)
    except _EnoughError:
        raise DataError(f"{url} has no file within its first headers", "fetch it and look with tar -t") from None
    except DataError as error:
        raise DataError(
            f"{url} is no tar, or damaged: {error.message.removeprefix('the tar cannot be read: ')}",
            "fetch or write it again; `lathe encode` uses what stands before the damage",
        ) from error
    facts: dict[str, Any] = {"bytes": Size(size)}
    if has_receipt:
        facts = receipt_facts(load_receipt(store, name + RECEIPT_SUFFIX))
        del facts["shard"]
    else:
        facts["samples"] = contents.samples
        facts["members"] = dict(contents.counts)
        facts["bytes_by_kind"] = {kind: Size(count) for kind, count in contents.sizes.items()}
        if not contents.whole:
            facts["seen"] = (
                f"the first {contents.at / size:.0%}: about {contents.samples * size // contents.at:,} samples"
            )
    if has_receipt or contents.counts["latent.npy"]:
        return Description("latent shard", url, facts, _latents(ranges, contents.first, contents.samples))
    return Description("image shard", url, facts, [_pictures(ranges, contents.first, contents.samples)])


def _open(store: Store, name: str, size: int, most_requests: float = math.inf) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Ranges(store, name, size, most_requests), _WINDOW))


def _walk(ranges: BinaryIO, length: int, samples: int, *, to_the_end: bool) -> _Contents:
    """Raises DataError where it is damaged, _EnoughError where no file was met before that."""

    def read(start: int, end: int) -> bytes:
        ranges.seek(start)
        return ranges.read(end - start)

    contents = _Contents()
    current = None
    try:
        for name, offset, size in members_at(read, length, whole=True):
            key, extension = split_name(name)
            contents.at = offset + size
            if not key:  # no sample's
                continue
            if key != current:
                if contents.samples == samples and not to_the_end:
                    return contents
                current, contents.samples = key, contents.samples + 1
                if contents.samples <= samples:
                    contents.first.append(_Sample(key))
            if contents.samples <= samples:
                contents.first[-1].members[extension] = offset, size
            if len(contents.counts) < 20 or extension in contents.counts:
                contents.counts[extension] += 1
                contents.sizes[extension] += size
        contents.whole = True
    except _EnoughError:
        if not contents.at:
            raise
    return contents


def _read(ranges: BinaryIO, place: tuple[int, int] | None, limit: int) -> bytes:
    if place is None:
        return b""
    ranges.seek(place[0])
    return ranges.read(min(place[1], limit))


def _about(ranges: BinaryIO, sample: _Sample) -> dict[str, Any]:
    try:
        tree = json.loads(_read(ranges, sample.members.get("json"), _MOST_TEXT) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _first_text(value: Any) -> str:
    """Of a caption or a list of them; anything else may stand there."""
    first = next(iter(value), "") if isinstance(value, list) else value
    return first if isinstance(first, str) else ""


def _pictures(ranges: BinaryIO, first: list[_Sample], total: int) -> Section:
    from pipeline.data import images  # imports torch: only who looks at pictures waits for it

    rows = []
    for sample in first:
        extension = next((name for name in sample.members if name in IMAGE_EXTENSIONS), "")
        place = sample.members.get(extension)
        try:
            height, width = images.probe(_read(ranges, place, _MOST_PICTURE))
            shape = f"{height} x {width}"
        except images.ImageError as error:
            shape = error.reason if place else "no picture"
        caption = _read(ranges, sample.members.get("txt"), _MOST_TEXT).decode("utf-8", "replace").strip()
        caption = caption or _first_text(_about(ranges, sample).get("caption"))
        rows.append((sample.key, extension, Size(place[1] if place else 0), shape, caption[:60]))
    columns = ("key", "format", "bytes", "height_x_width", "caption")
    return Section("first samples", columns, rows, total - len(rows))


def _latents(ranges: BinaryIO, first: list[_Sample], total: int) -> list[Section]:
    arrays = [
        (extension, *_array(_read(ranges, place, _ARRAY_HEADER)), Size(place[1]))
        for sample in first[:1]
        for extension, place in sample.members.items()
    ]
    rows = []
    for other in first:
        about = _about(ranges, other)
        captions, bucket = about.get("captions"), about.get("bucket")
        captions = captions if isinstance(captions, list) else []
        size = Size(sum(length for _, length in other.members.values()))
        sides = bucket if isinstance(bucket, list) and all(isinstance(side, int) for side in bucket) else []
        rows.append((other.key, " x ".join(map(str, sides)), size, len(captions), _first_text(captions)[:60]))
    columns = ("key", "height_x_width", "bytes", "captions", "first_caption")
    return [
        Section("members of the first sample", ("member", "dtype", "shape", "bytes"), arrays),
        Section("first samples", columns, rows),
    ]


def _array(data: bytes) -> tuple[str, str]:
    """dtype and shape of a .npy file, from its beginning; empty for other files."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = parse(stream)
    except Exception:  # numpy leaves it to Python's own parser, which fails in many ways
        return "", ""
    return str(dtype), " x ".join(map(str, shape))
