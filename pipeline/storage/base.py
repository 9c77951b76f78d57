"""What every store can do, and which names it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pipeline.errors import StorageError

RETRY_VARIABLE = "LATHE_STORAGE_RETRY_SECONDS"
"""How long a server that is silent or busy is asked again; a part of it is the silence that a request may keep."""
GIVE_UP_VARIABLE = "LATHE_STORAGE_GIVE_UP_SECONDS"
"""How long it is asked again by who gives `open_store` this, with the same silence of a request."""


@dataclass(frozen=True, order=True)
class Entry:
    """One file of a store: its name relative to the store, its size in bytes, and its version.

    The version changes with the content: the ETag on S3, the time of the last change in nanoseconds in a folder.
    It takes no part in comparisons.
    """

    name: str
    size: int
    version: str = field(default="", compare=False)


class OpenFile(Protocol):
    """One file as it was when it was opened. It may be read from several threads."""

    size: int
    version: str

    def read(self, start: int, end: int) -> bytes:
        """The bytes `start:end`, cut at the file's end. Raises StorageError if the file has changed since."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Store(Protocol):
    """A local folder or an `s3://` prefix. Names are relative to it, with `/` between their parts.

    Every method raises StorageError for what the user can mend: a missing bucket or file, a wrong key, a full
    disk, an address that does not answer. Methods may be called from several threads, and after a fork.
    """

    url: str

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes `start:end` of a file, cut at its end as a slice is; the whole file by default."""
        ...

    def write(self, name: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """Write a file, whole or not at all. False where it existed already and `if_absent` was asked for."""
        ...

    def upload(self, local: Path, name: str) -> None:
        """Copy a local file into the store without holding it in memory; it appears whole or not at all."""
        ...

    def download(self, name: str, local: Path) -> None:
        """Copy a file of the store to a local path without holding it in memory; whole or not at all."""
        ...

    def open(self, name: str) -> OpenFile:
        """A file to be read in ranges that are all of one version."""
        ...

    def list(
        self,
        prefix: str = "",
        *,
        into: Callable[[str], bool] | None = None,
        left_out: Callable[[str, str], object] | None = None,
    ) -> list[Entry]:
        """Every file whose name begins with `prefix`, sorted by name.

        In sub-folders too, where `into` is given only in those that it takes by their names (`a`, `a/b`). `left_out` is
        told the name of what is in a folder and no file that can be listed, and why: a pipe, a link to nowhere or to
        itself, a sub-folder without rights. Without it, some of these are passed over, and others are an error.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; names that do not exist are passed over."""
        ...

    def leftovers(self) -> tuple[str, ...]:
        """What killed writers left, and what is being written at the moment, sorted: `list` shows neither.

        In a folder the names of partial files; on S3, of each unfinished upload, the name that the file was to have.
        """
        ...

    def sweep(self, names: Iterable[str], older_than_seconds: float = 0.0) -> int:
        """Drop what killed writers of these names left, or of those that `leftovers` tells. Returns how many.

        A live writer that is swept notices, and begins anew.
        """
        ...


def checked_name(name: str) -> str:
    """The name itself, where it stays inside its store.

    Raises:
        StorageError: an empty or absolute name, one with `..`, or with control characters.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name:
        raise StorageError(
            f"{name!r} is not a name inside a store", "use relative names without '..', such as a/b.json"
        )
    return name


def checked_prefix(prefix: str) -> str:
    """As `checked_name`, for the beginning of names: it may be empty or end in `/`."""
    if prefix.rstrip("/"):
        checked_name(prefix.removesuffix("/"))
    elif prefix:
        checked_name(prefix)
    return prefix


def checked_range(start: int | None, end: int | None) -> tuple[int, int | None]:
    """First byte and end of a range; offsets count from the beginning of the file."""
    first = start or 0
    if first < 0 or (end is not None and end < first):
        raise ValueError(f"not a range of bytes: start={start}, end={end}")
    return first, end


def changed(place: str) -> StorageError:
    """The error about a file that is no longer the one that was opened."""
    return StorageError(
        f"{place} changed while it was read", "leave the files alone while they are read, then run the command again"
    )
