"""Image shards, as img2dataset and `lathe pack` write them, into samples: KEY.jpg, KEY.txt, KEY.json.

Names are taken apart as webdataset does it. Its own reader cannot tell a damaged shard from a whole one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline.data.manifest import key_hash
from pipeline.data.tar_stream import TarStream
from pipeline.errors import DataError

IMAGE_EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "apng",
        "webp",
        "gif",
        "bmp",
        "dib",
        "tif",
        "tiff",
        "avif",
        "jp2",
        "j2k",
        "jpx",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "tga",
        "ico",
        "qoi",
    )
)
MAX_FILE_BYTES = 128 << 20  # of a picture
MAX_TEXT_BYTES = 8 << 20  # of KEY.txt and KEY.json; parsed JSON takes ten times as much
MAX_KEY_BYTES = 1000  # in UTF-8
MAX_CAPTION_CHARS = 65_536
MAX_CAPTIONS = 256  # of one picture: each is stored

SHARD_DAMAGED = "shard_damaged"
REASONS = (
    "no_image",
    "several_images",
    "no_caption",
    "caption_not_utf8",
    "caption_too_long",
    "too_many_captions",
    "metadata_not_json",
    "unsafe_key",
    "key_too_long",
    "file_too_large",
    "duplicate_member",
    "duplicate_key",
    SHARD_DAMAGED,
)
"""Why there is no sample."""

_TEXT_EXTENSIONS = frozenset(("txt", "json"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


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

    key: str  # its first `MAX_KEY_BYTES` characters
    reason: str


def read_image_shard(stream: BinaryIO, caption_field: str = "caption") -> Iterator[ImageSample | Rejected]:
    """The samples of one image shard, in file order, in the memory of one of them.

    Args:
        stream: the tar, plain or compressed (gzip, bzip2, xz), from its first byte. It need not seek. It is read to its
            end unless the tar is damaged, and not closed.
        caption_field: field of KEY.json with one caption or a list of them, where there is no KEY.txt.

    Yields:
        A sample, or why there is none, one of `REASONS`; at the end `shard_damaged` when the tar could not be read to
        its end. Of a damaged tar the last sample is dropped: what belongs to it may be missing.
    """
    seen: set[int] = set()
    try:
        for files in _by_key(TarStream(stream)):
            known = key_hash(files.key)  # a key may be a megabyte long
            sample = Rejected(files.key, "duplicate_key") if known in seen else _sample(files, caption_field)
            yield Rejected(sample.key[:MAX_KEY_BYTES], sample.reason) if isinstance(sample, Rejected) else sample
            seen.add(known)
    except DataError:
        yield Rejected("", SHARD_DAMAGED)


def is_holdout(key: str, fraction: float) -> bool:
    """Whether a sample is held out of training: by its key alone, so that adding data moves no other sample."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class _Files:
    """The files of one key as they come, and the first reason why they make no sample."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.problem = ""
        self.images = 0
        self._content: dict[str, bytes] = {}

    def add(self, extension: str, size: int, read: Callable[[], bytes]) -> None:
        """Take in one file; of what cannot become a sample no byte is kept."""
        is_image = extension in IMAGE_EXTENSIONS
        self.images += is_image
        if extension in self._content:
            self.problem = "duplicate_member"
        elif size > (MAX_FILE_BYTES if is_image else MAX_TEXT_BYTES):
            self.problem = self.problem or "file_too_large"
        self._content[extension] = b"" if self.problem or self.images > 1 else read()

    def image(self) -> bytes:
        """The picture, where there is one only."""
        return next(data for extension, data in self._content.items() if extension in IMAGE_EXTENSIONS)

    def text(self, extension: str) -> bytes | None:
        """Content of KEY.txt or KEY.json, None where there is none."""
        return self._content.get(extension)


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member: the key ends at the first dot of the base name, as in webdataset.

    Both are empty for what webdataset passes over: names without a dot, hidden files, its own `__entries__`.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or (name.startswith("__") and name.partition("/")[0].endswith("__")):
        return "", ""
    return folder + slash + stem, extension.lower()


def _by_key(tar: TarStream) -> Iterator[_Files]:
    """Files of one key that stand together. Raises DataError instead of giving the last ones of a damaged tar."""
    files: _Files | None = None
    for name, size in tar:
        key, extension = split_name(name)
        if extension not in IMAGE_EXTENSIONS and extension not in _TEXT_EXTENSIONS:
            continue
        if files is None or key != files.key:
            if files is not None:
                yield files
            files = _Files(key)
        files.add(extension, size, tar.read)
    if files is not None:
        yield files


def _sample(files: _Files, caption_field: str) -> ImageSample | Rejected:
    if problem := _problem_of_files(files):
        return Rejected(files.key, problem)
    text = files.text("json")
    try:
        metadata = json.loads(b"{}" if text is None else text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        return Rejected(files.key, "metadata_not_json")
    try:
        captions = _captions(files.text("txt"), metadata.get(caption_field))
    except UnicodeError:
        return Rejected(files.key, "caption_not_utf8")
    if problem := _problem_of_captions(captions):
        return Rejected(files.key, problem)
    return ImageSample(files.key, files.image(), captions, metadata)


def _problem_of_files(files: _Files) -> str:
    if files.problem == "duplicate_member":
        return files.problem
    if problem := _problem_of_key(files.key) or files.problem:
        return problem
    return "" if files.images == 1 else "several_images" if files.images else "no_image"


def _problem_of_key(key: str) -> str:
    """Why the key cannot name members of an archive that others will unpack, or a line in a list; empty if it can."""
    try:
        if len(key.encode("utf-8")) > MAX_KEY_BYTES:
            return "key_too_long"
    except UnicodeEncodeError:
        return "unsafe_key" if len(key) <= MAX_KEY_BYTES else "key_too_long"
    unsafe = key.startswith("/") or ".." in key.split("/") or _CONTROL.search(key)
    return "unsafe_key" if unsafe else ""


def _captions(text: bytes | None, from_json: Any) -> tuple[str, ...]:
    """Raises UnicodeError for what UTF-8 cannot say, which JSON's escapes can."""
    single = text.decode("utf-8-sig") if text is not None else from_json
    captions = [c.strip() for c in (single if isinstance(single, list) else [single]) if isinstance(c, str)]
    for caption in captions:
        caption.encode("utf-8")
    return tuple(caption for caption in captions if caption)


def _problem_of_captions(captions: tuple[str, ...]) -> str:
    if not captions:
        return "no_caption"
    if max(map(len, captions)) > MAX_CAPTION_CHARS:
        return "caption_too_long"
    return "too_many_captions" if len(captions) > MAX_CAPTIONS else ""
