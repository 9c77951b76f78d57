"""What every store can do, and which names it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import StorageError


@dataclass(frozen=True, order=True)
class Entry:
    """One file of a store: its name relative to the store, and its size in bytes."""

    name: str
    size: int


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

    def list(self, prefix: str = "") -> list[Entry]:
        """Every file whose name begins with `prefix`, in sub-folders too, sorted by name."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; names that do not exist are passed over."""
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
