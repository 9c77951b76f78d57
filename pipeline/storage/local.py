"""A store in a local (or mounted) folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StorageError
from pipeline.storage.base import Entry, checked_name, checked_prefix, checked_range

_PARTIAL = ".partial"  # files being written: `.NAME.RANDOM.partial`, never listed
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStore:
    """A folder. It is made by the first write."""

    def __init__(self, folder: str | Path) -> None:
        self.url = str(folder)
        self._folder = Path(folder)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """See Store.read."""
        path = self._path(name)
        first, end = checked_range(start, end)
        with translated(path), path.open("rb") as file:
            file.seek(first)
            return file.read() if end is None else file.read(end - first)

    def write(self, name: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """See Store.write."""
        path = self._path(name)
        if if_absent and path.exists():
            return False
        with translated(path):
            try:
                with atomic_file(path, replace=not if_absent) as file:
                    file.write(data)
            except FileExistsError:
                if not if_absent:
                    raise
                return False
        return True

    def upload(self, local: Path, name: str) -> None:
        """See Store.upload."""
        copy(local, self._path(name))

    def download(self, name: str, local: Path) -> None:
        """See Store.download."""
        copy(self._path(name), local)

    def list(self, prefix: str = "") -> list[Entry]:
        """See Store.list."""
        deepest = self._folder / checked_prefix(prefix).rpartition("/")[0]
        entries = []
        with translated(deepest):
            for folder, _, files in os.walk(deepest, onerror=_raise_unless_missing, followlinks=True):
                for file in files:
                    path = Path(folder, file)
                    name = path.relative_to(self._folder).as_posix()
                    if name.startswith(prefix) and not file.endswith(_PARTIAL):
                        with suppress(FileNotFoundError):  # deleted since
                            entries.append(Entry(name, path.stat().st_size))
        return sorted(entries)

    def exists(self, name: str) -> bool:
        """See Store.exists."""
        path = self._path(name)
        with translated(path):
            return path.is_file()

    def delete(self, names: Iterable[str]) -> None:
        """See Store.delete. Folders left empty go too, as they do on S3."""
        for name in names:
            path = self._path(name)
            with translated(path):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                for parent in path.relative_to(self._folder).parents[:-1]:
                    (self._folder / parent).rmdir()

    def _path(self, name: str) -> Path:
        return self._folder / checked_name(name)


def copy(source: Path, target: Path) -> None:
    """Copy a local file, whole or not at all. Raises StorageError."""
    with translated(source):
        reader = source.open("rb")
    with reader, translated(target), atomic_file(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


@contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A file that takes its name once it is written and on disk; on failure nothing is left.

    Raises:
        FileExistsError: the name is taken, and `replace` is off.
        OSError: as the operating system says; see `translated`.
    """
    partial = path.with_name(f".{path.name[:180]}.{secrets.token_hex(6)}{_PARTIAL}")
    file = _create(partial)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            path.hardlink_to(partial)  # refuses a name that is taken, in one step
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _create(path: Path) -> BinaryIO:
    for _ in range(10):  # `delete` elsewhere may take the emptied folder away in between
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb")
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into StorageError."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error) from error


def _explain(path: Path, error: OSError) -> StorageError:
    said = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing(path)).free
        return StorageError(
            f"{path}: no room to write it ({said}; {free / 2**20:.0f} MiB free)",
            "free some disk space or raise the quota, or write to another disk; nothing was left half-written",
        )
    if isinstance(error, FileNotFoundError):
        return StorageError(
            f"{path}: no such file", f"check the path; its nearest existing folder is {_existing(path)}"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return StorageError(f"{path}: {said}", "change its permissions, or use another folder")
    if isinstance(error, NotADirectoryError | FileExistsError | IsADirectoryError):
        return StorageError(f"{path}: {said}", "a file stands where a folder is needed, or the other way round")
    return StorageError(f"{path}: {said}", "check the disk and the path")


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
