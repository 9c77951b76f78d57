"""One picture on its way into a shard: its key, where its bytes are, its captions, what else its table says of it."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data import images
from pipeline.data.samples import IMAGE_EXTENSIONS, MAX_FILE_BYTES, MAX_KEY_BYTES
from pipeline.errors import DataError, StorageError

_MAGIC: tuple[tuple[str, bytes], ...] = (  # patterns at the start of a file
    ("jpg", rb"\xff\xd8\xff"),
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("webp", rb"RIFF....WEBP"),
    ("gif", rb"GIF8[79]a"),
    ("avif", rb"....ftypavi[fs]"),
    ("jp2", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    ("tiff", rb"II\*\x00|MM\x00\*"),
    ("bmp", rb"BM"),
    ("qoi", rb"qoif"),
    ("ppm", rb"P[1-6]\s"),
    ("ico", rb"\x00\x00\x01\x00"),
)


class UnusableError(DataError):
    """A picture that cannot be packed: raised, or counted by its short reason where these are skipped.

    Reasons: `no_image`, `missing_file`, `unreadable_file`, `file_too_large`, `no_caption`, `caption_not_text`,
    `bad_key`, `duplicate_key`, `bad_row`, and those of `images.ImageError`.
    """

    def __init__(self, reason: str, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.reason = reason


@dataclass(frozen=True)
class Item:
    """One picture: of a file, or of bytes that a table holds."""

    key: str
    where: str  # as a person is told: the file, or the table and its row
    picture: Path | bytes
    captions: tuple[str, ...]  # at least one, none empty
    metadata: dict[str, Any] = field(default_factory=dict)

    def members(self) -> dict[str, str | bytes]:
        """The sample as webdataset's TarWriter takes it: `__key__`, the picture, `txt` and `json`.

        Several captions are a list in `json`, and there is no `txt`.

        Raises:
            UnusableError: the picture is not there, or no picture.
            StorageError: reading failed for another reason, which may pass.
        """
        data = self.picture if isinstance(self.picture, bytes) else _read(self.picture, self.where)
        try:
            images.probe(data)
        except images.ImageError as error:
            raise UnusableError(
                error.reason, f"{self.where} is not a usable picture: {error.reason}", "mend or remove the file"
            ) from error
        sample: dict[str, str | bytes] = {"__key__": self.key, self._extension(data): data}
        about: dict[str, Any] = {"caption": self.captions[0], **self.metadata}
        if len(self.captions) > 1:
            about["caption"] = list(self.captions)
        else:
            sample["txt"] = self.captions[0].encode("utf-8", "replace")
        if self.metadata or len(self.captions) > 1:
            sample["json"] = json.dumps(about, sort_keys=True).encode("ascii")
        return sample

    def _extension(self, data: bytes) -> str:
        named = self.picture.suffix.lower()[1:] if isinstance(self.picture, Path) else ""
        if named in IMAGE_EXTENSIONS:
            return named
        found = next((name for name, start in _MAGIC if re.match(start, data, re.DOTALL)), "")
        if found in IMAGE_EXTENSIONS:
            return found
        raise UnusableError(
            "not_an_image", f"{self.where} is not of a format that Lathe packs", "save it as PNG, JPEG or WebP"
        )


def safe_key(name: str) -> str:
    """The sample key of a file: its path without suffix, and without what would change its meaning in a shard.

    Dots of the file's name (a key ends at the first), control characters and bytes that are not UTF-8 become `_`;
    so does a leading `__`, by which webdataset knows its own entries.
    """
    path = PurePosixPath(name)
    return _printable(path.parent / path.stem.replace(".", "_"))


def contained_key(name: str, *, is_file: bool) -> str:
    """As `safe_key`, of text that anybody may have written: nothing absolute, no `..`, no backslash.

    Args:
        name: a path, or what a table says the key is.
        is_file: a picture's suffix is no part of the key.

    Raises:
        ValueError: nothing is left of it, or it is longer than `MAX_KEY_BYTES`.
    """
    parts = [part for part in name.replace("\\", "_").split("/") if part not in ("", ".", "..")]
    if not parts:
        raise ValueError("it is empty")
    path = PurePosixPath(*parts)
    if is_file and path.suffix.lower()[1:] in IMAGE_EXTENSIONS:
        path = path.with_suffix("")
    key = _printable(path.parent / path.name.replace(".", "_"))
    if len(key.encode("utf-8")) > MAX_KEY_BYTES:
        raise ValueError(f"it is longer than {MAX_KEY_BYTES} bytes")
    return key


def _printable(path: PurePosixPath) -> str:
    return "".join(c if c.isprintable() else "_" for c in re.sub("^__", "_", path.as_posix()))


def _read(path: Path, where: str) -> bytes:
    if where != str(path):
        where = f"{where} names {path}, which"
    try:
        if not path.is_file():  # a device or a pipe would never end
            reason, said = ("unreadable_file", "is no file") if path.exists() else ("missing_file", "is not there")
            raise UnusableError(reason, f"{where} {said}", "correct the path, or set on_error=skip")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UnusableError("file_too_large", f"{where} is over {MAX_FILE_BYTES >> 20} MiB", "make it smaller")
        return path.read_bytes()
    except PermissionError as error:
        raise UnusableError("unreadable_file", f"{where} may not be read", "make the file readable") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnusableError(
                "missing_file", f"{where} is no path", "correct the path, or set on_error=skip"
            ) from error
        raise StorageError(f"{path}: {error.strerror or error}", "make the file readable") from error
