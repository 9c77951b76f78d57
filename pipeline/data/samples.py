"""Image shards, as img2dataset and `lathe pack` write them, into samples: KEY.jpg, KEY.txt, KEY.json.

webdataset reads them here, on a stream that is already open and without its decoders: given a name it would run
`pipe:` addresses in a shell, and its decoders unpickle.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from pipeline.data.tar import members
from pipeline.errors import DataError

IMAGE_EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "avif",
        "jp2",
        "ppm",
        "pgm",
        "pbm",
        "tga",
        "ico",
    )
)


SHARD_DAMAGED = "shard_damaged"


@dataclass(frozen=True)
class ImageSample:
    """A picture as it came, with its captions. The key is text from the archive: never a file name."""

    key: str
    image_bytes: bytes
    captions: tuple[str, ...]  # at least one, none empty
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used. Reasons are short and stable; `shard_damaged` has an empty key."""

    key: str
    reason: str


def read_image_shard(data: bytes, caption_field: str = "caption") -> Iterator[ImageSample | Rejected]:
    """The samples of one image shard, in file order.

    Args:
        data: the whole tar.
        caption_field: field of KEY.json with one caption or a list of them, where there is no KEY.txt.

    Yields:
        A sample, or why there is none: `no_image`, `several_images`, `no_caption`, `caption_not_utf8`,
        `metadata_not_json`, `unsafe_key`, `duplicate_member`, `duplicate_key`, and at the end `shard_damaged` when the
        tar could not be read to its end.
    """
    damage: list[Exception] = []

    def note(error: Exception) -> bool:
        damage.append(error)
        return True

    files = tar_file_expander([{"url": "", "stream": io.BytesIO(data)}], handler=note, select_files=_wanted)
    doubled: set[str] = set()
    seen: set[str] = set()
    for group in group_by_keys(_once(files, doubled)):
        key = group["__key__"]
        if key in seen:
            yield Rejected(key, "duplicate_key")
        elif key in doubled:
            yield Rejected(key, "duplicate_member")
        else:
            yield _sample(key, group, caption_field)
        seen.add(key)
    if damage or not _is_whole(data):
        yield Rejected("", SHARD_DAMAGED)


def is_holdout(key: str, fraction: float) -> bool:
    """Whether a sample is held out of training: by its key alone, so that adding data moves no other sample."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _is_whole(data: bytes) -> bool:
    """tarfile takes a damaged header in the middle, or a file cut between members, for the end."""
    if data[257:262] != b"ustar":  # compressed (its own checksums tell), or no tar at all
        return True
    try:
        for _ in members(data, whole=True):
            pass
    except DataError:
        return False
    return True


def _wanted(name: str) -> bool:
    extension = (base_plus_ext(name)[1] or "").lower()
    return extension in IMAGE_EXTENSIONS or extension in {"txt", "json"}


def _once(files: Iterable[dict[str, Any]], doubled: set[str]) -> Iterator[dict[str, Any]]:
    """Drops members that repeat a name within a key, which would end webdataset's grouping, and notes the key."""
    current, extensions = None, set[str]()
    for file in files:
        if file:
            key, extension = base_plus_ext(file["fname"])
            if key != current:
                current, extensions = key, set()
            if extension.lower() in extensions:
                doubled.add(key)
                continue
            extensions.add(extension.lower())
        yield file


def _sample(key: str, group: dict[str, bytes], caption_field: str) -> ImageSample | Rejected:
    images = [name for name in group if name in IMAGE_EXTENSIONS]
    if not _safe(key):
        return Rejected(key, "unsafe_key")
    if len(images) != 1:
        return Rejected(key, "several_images" if images else "no_image")
    try:
        metadata = json.loads(group.get("json", b"{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        return Rejected(key, "metadata_not_json")
    try:
        captions = _captions(group.get("txt"), metadata.get(caption_field))
    except UnicodeError:
        return Rejected(key, "caption_not_utf8")
    if not captions:
        return Rejected(key, "no_caption")
    return ImageSample(key, group[images[0]], captions, metadata)


def _safe(key: str) -> bool:
    """Whether the key can name members of an archive that others will unpack."""
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not key.startswith("/") and ".." not in key.split("/") and "\0" not in key


def _captions(text: bytes | None, from_json: Any) -> tuple[str, ...]:
    """Raises UnicodeError for what UTF-8 cannot say, which JSON's escapes can."""
    single = text.decode("utf-8") if text is not None else from_json
    captions = [c.strip() for c in (single if isinstance(single, list) else [single]) if isinstance(c, str)]
    for caption in captions:
        caption.encode("utf-8")
    return tuple(caption for caption in captions if caption)
