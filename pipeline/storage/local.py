"""A store in a local (or mounted) folder."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StorageError
from pipeline.storage import traffic
from pipeline.storage.base import Entry, changed, checked_name, checked_prefix, checked_range
from pipeline.storage.whole_file import PARTIAL, partial_of, stem_of, write_whole

_log = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalFile:
    """See base.OpenFile. A file that takes this one's name leaves it as it is; only a change in place is an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with translated(path):
            self._file = _opened(path)
        self.size, self.version = self._state()

    def read(self, start: int, end: int) -> bytes:
        """See OpenFile.read."""
        wanted = max(0, min(end, self.size) - start)
        with translated(self._path), traffic.timed("read"):
            data = _pread(self._file, start, wanted)
        if len(data) < wanted or self._state() != (self.size, self.version):
            raise changed(str(self._path))
        traffic.count_bytes(read=len(data))
        return data

    def close(self) -> None:
        """See OpenFile.close."""
        self._file.close()

    def _state(self) -> tuple[int, str]:
        status = os.fstat(self._file.fileno())
        return status.st_size, _version(status)


class LocalStore:
    """A folder. It is made by the first write."""

    def __init__(self, folder: str | Path) -> None:
        self.url = str(folder)
        self._folder = Path(folder)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """See Store.read."""
        path = self._path(name)
        first, end = checked_range(start, end)
        ranged = start is not None or end is not None
        with translated(path), traffic.timed("read"), _opened(path) as file:
            there = os.fstat(file.fileno()).st_size - first
            data = file.read() if not ranged else _pread(file, first, there if end is None else min(end - first, there))
        traffic.count_bytes(read=len(data))
        return data

    def write(self, name: str, data: bytes | memoryview, *, if_absent: bool = False) -> bool:
        """See Store.write."""
        path = self._path(name)
        if if_absent and path.exists():
            return False
        with translated(path):
            try:
                with traffic.timed("write"):
                    size = write_whole(path, lambda file: file.write(data), replace=not if_absent)
            except FileExistsError:
                if not if_absent:
                    raise
                return False
        traffic.count_bytes(written=size)
        return True

    def upload(self, local: Path, name: str) -> None:
        """See Store.upload."""
        with traffic.timed("write"):
            traffic.count_bytes(written=_copy(local, self._path(name)))

    def download(self, name: str, local: Path) -> None:
        """See Store.download."""
        with traffic.timed("read"):
            traffic.count_bytes(read=_copy(self._path(name), local))

    def open(self, name: str) -> LocalFile:
        """See Store.open."""
        return LocalFile(self._path(name))

    def list(
        self,
        prefix: str = "",
        *,
        into: Callable[[str], bool] | None = None,
        left_out: Callable[[str, str], object] | None = None,
    ) -> list[Entry]:
        """See Store.list."""
        deepest = self._folder / checked_prefix(prefix).rpartition("/")[0]
        entries = []
        with translated(deepest):
            for name in self._names(deepest, into, left_out):
                if name.startswith(prefix) and not name.endswith(PARTIAL):
                    entry = self._entry(name, left_out)
                    entries += [entry] if entry else []
        return sorted(entries)

    def _entry(self, name: str, left_out: Callable[[str, str], object] | None) -> Entry | None:
        path = self._folder / name
        try:
            status = path.stat()
        except OSError as error:
            is_away = isinstance(error, FileNotFoundError)
            if is_away and not path.is_symlink():  # deleted since
                return None
            if left_out is not None:
                left_out(name, "a link to a file that is not there" if is_away else os.strerror(error.errno or 0))
            elif is_away:
                _log.warning("%s is a link to a file that is not there", path)
            else:
                with translated(path):
                    raise
            return None
        if stat.S_ISREG(status.st_mode):
            return Entry(name, status.st_size, _version(status))
        if left_out is not None:  # whoever opens a pipe waits for its other end
            left_out(name, "no file, but a pipe or a device")
        return None

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

    def leftovers(self) -> tuple[str, ...]:
        """See Store.leftovers."""
        with translated(self._folder):
            return tuple(sorted(name for name in self._names(self._folder) if partial_of(name.rpartition("/")[2])))

    def sweep(self, names: Iterable[str], older_than_seconds: float = 0.0) -> int:
        """See Store.sweep."""
        stems: dict[Path, set[str]] = {}
        for path in map(self._path, names):
            stems.setdefault(path.parent, set()).add(partial_of(path.name) or stem_of(path.name))
        swept = 0
        for folder, wanted in stems.items():
            with translated(folder):
                for path in folder.iterdir() if folder.is_dir() else ():
                    if partial_of(path.name) in wanted and _is_older(path, older_than_seconds):
                        path.unlink(missing_ok=True)
                        swept += 1
        return swept

    def _names(
        self,
        start: Path,
        into: Callable[[str], bool] | None = None,
        left_out: Callable[[str, str], object] | None = None,
    ) -> Iterator[str]:
        """Every file below `start`, partial ones too."""

        def failed(error: OSError) -> None:
            inside = Path(error.filename).relative_to(self._folder).as_posix()
            if left_out is None or inside == ".":
                _raise_unless_missing(error)
            elif not isinstance(error, FileNotFoundError):  # deleted since
                left_out(inside, os.strerror(error.errno or 0))

        for folder, folders, files in os.walk(start, onerror=failed, followlinks=True):
            inside = Path(folder).relative_to(self._folder)
            if into is not None:
                folders[:] = [name for name in folders if into((inside / name).as_posix())]
            yield from ((inside / name).as_posix() for name in files)

    def _path(self, name: str) -> Path:
        return self._folder / checked_name(name)


def _copy(source: Path, target: Path) -> int:
    """Copy a local file, whole or not at all; its size. Raises StorageError."""
    with translated(source):
        reader = _opened(source)

    def fill(writer: BinaryIO) -> None:
        reader.seek(0)
        shutil.copyfileobj(reader, writer, 1 << 20)

    with reader, translated(target):
        return write_whole(target, fill)


def _version(status: os.stat_result) -> str:
    return str(status.st_mtime_ns)


def _is_older(path: Path, seconds: float) -> bool:
    if not seconds:
        return True
    try:
        return path.stat().st_mtime < time.time() - seconds
    except FileNotFoundError:
        return False


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about `path` into StorageError."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            traffic.count_error(_kind(error))
        raise _explain(path, error) from error


def _kind(error: OSError) -> str:
    """In the words of S3's errors."""
    if error.errno in _FULL:
        return "no_room"
    return "forbidden" if isinstance(error, PermissionError) or error.errno == errno.EROFS else "other"


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


def _pread(file: FileIO, start: int, wanted: int) -> bytes:
    """So many bytes, or those up to the file's end."""
    data = os.pread(file.fileno(), max(0, wanted), start)
    while len(data) < wanted and (more := os.pread(file.fileno(), wanted - len(data), start + len(data))):
        data += more
    return data


def _opened(path: Path) -> FileIO:
    """A regular file to be read; who opens a pipe would wait for its other end. Raises StorageError for others."""
    file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise StorageError(f"{path} is no file, but a pipe or a device", "put a plain file there")
