"""A run's log as it grows, read by another process than the one that writes it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.metrics.log import LOG, PARTS, LogStore, can_append, parsed_line

_CHUNK = 1 << 20
_LONGEST_LINE = 16 << 20  # of ours a thousandth; what is longer is no log
_READERS, _AHEAD = 16, 64  # parts
_MARK = 64  # bytes at the end of what was read, by which it is known again
Progress = Callable[[int, int], None]


class LogFollower:
    """Gives each line of a log once, whatever its length; a log that was begun anew or cut is given from its start.

    Args:
        store: of the run.
    """

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self.damaged = 0
        """Lines so far that were torn by a kill, or are none of a log."""
        self.bytes = 0
        """How much of the log was read."""
        self._file: tuple[int, int] | None = None  # device and inode
        self._mark = b""
        self._rest = b""
        self._parts: dict[str, str] = {}  # name -> version, of S3's parts that were read

    def changed(self, listed: Sequence[Any] | None = None) -> bool:
        """Whether what was given so far no longer holds. Call it before `lines`, which then begins anew.

        Args:
            listed: the store's entries, where they were listed a moment ago.

        Raises:
            StorageError, OSError: S3, or a folder, does not tell.
        """
        gone = self._file_gone() if can_append(self._store) else self._parts_gone(listed)
        if gone:
            self.damaged, self.bytes, self._file, self._mark, self._rest, self._parts = 0, 0, None, b"", b"", {}
        return gone

    def lines(self, listed: Sequence[Any] | None = None, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
        """What has come since the last call.

        Args:
            listed: the store's entries, where they were listed a moment ago.
            progress: called with (parts read, parts to read), on S3.

        Raises:
            StorageError, OSError: S3, or a folder, cannot be read.
        """
        chunks = self._new_bytes() if can_append(self._store) else self._new_parts(listed, progress)
        for chunk in chunks:
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for text in whole:
                yield from self._parsed(text)
            if len(self._rest) > _LONGEST_LINE:
                self._rest, self.damaged = b"", self.damaged + 1
        if parsed_line(self._rest) is not None:  # whole but for its end, which a full disk or a part may lack
            text, self._rest = self._rest, b""
            yield from self._parsed(text)

    def _parsed(self, text: bytes) -> Iterator[dict[str, Any]]:
        line = parsed_line(text)
        if line is not None:
            yield line
        elif text.strip():
            self.damaged += 1

    def _opened(self) -> FileIO | None:
        """The log's file; None where none is there. Who opens a pipe would wait for its other end."""
        try:
            file = open(Path(self._store.url) / LOG, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        return None

    def _file_gone(self) -> bool:
        """Whether another file has the log's name, or this one has other content where it was read."""
        if self._file is None:
            return False
        file = self._opened()
        if file is None:
            return True
        with file:
            status = os.fstat(file.fileno())
            mark = os.pread(file.fileno(), len(self._mark), self.bytes - len(self._mark))
        return (status.st_dev, status.st_ino) != self._file or mark != self._mark

    def _new_bytes(self) -> Iterator[bytes]:
        file = self._opened()
        if file is None:
            return
        with file:
            status = os.fstat(file.fileno())
            self._file = (status.st_dev, status.st_ino)
            file.seek(self.bytes)
            while chunk := file.read(_CHUNK):
                self.bytes += len(chunk)
                self._mark = (self._mark + chunk)[-_MARK:]
                yield chunk

    def _parts_gone(self, listed: Sequence[Any] | None) -> bool:
        there = {entry.name: entry.version for entry in self._listed(listed)} if self._parts else {}
        return any(there.get(name) != version for name, version in self._parts.items())

    def _new_parts(self, listed: Sequence[Any] | None, progress: Progress | None) -> Iterator[bytes]:
        new = [entry for entry in self._listed(listed) if entry.name not in self._parts]
        with ThreadPoolExecutor(_READERS, "log") as pool:
            for start in range(0, len(new), _AHEAD):
                some = new[start : start + _AHEAD]
                contents = pool.map(self._store.read, [entry.name for entry in some])
                for number, (entry, content) in enumerate(zip(some, contents, strict=True), start + 1):
                    self._parts[entry.name] = entry.version
                    self.bytes += len(content)
                    if progress:
                        progress(number, len(new))
                    yield content if content.endswith(b"\n") else content + b"\n"

    def _listed(self, listed: Sequence[Any] | None) -> list[Any]:
        entries = self._store.list(PARTS) if listed is None else listed
        return sorted((one for one in entries if one.name.startswith(PARTS)), key=lambda entry: str(entry.name))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
