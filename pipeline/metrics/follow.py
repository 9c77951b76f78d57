"""A run's log as it grows, read by another process than the one that writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.metrics.log import LOG, PARTS, LogStore, can_append, parsed_line

_CHUNK = 1 << 20
_LONGEST_LINE = 16 << 20  # of ours a thousandth; what is longer is no log


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
        self._rest = b""
        self._parts: dict[str, str] = {}  # name -> version, of S3's parts that were read

    def changed(self) -> bool:
        """Whether what was given so far no longer holds. Call it before `lines`, which then begins anew.

        Raises:
            StorageError, OSError: S3, or a folder, does not tell.
        """
        gone = self._file_gone() if can_append(self._store) else self._parts_gone()
        if gone:
            self.damaged, self.bytes, self._file, self._rest, self._parts = 0, 0, None, b"", {}
        return gone

    def lines(self) -> Iterator[dict[str, Any]]:
        """What has come since the last call. Raises StorageError, and OSError where a folder's log cannot be read."""
        chunks = self._new_bytes() if can_append(self._store) else self._new_parts()
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

    @property
    def _path(self) -> Path:
        return Path(self._store.url) / LOG

    def _file_gone(self) -> bool:
        if self._file is None:
            return False
        try:
            status = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        return (status.st_dev, status.st_ino) != self._file or status.st_size < self.bytes

    def _new_bytes(self) -> Iterator[bytes]:
        try:
            file = self._path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return
        with file:
            status = self._path.stat()
            self._file = (status.st_dev, status.st_ino)
            file.seek(self.bytes)
            while chunk := file.read(_CHUNK):
                self.bytes += len(chunk)
                yield chunk

    def _parts_gone(self) -> bool:
        there = {entry.name: entry.version for entry in self._store.list(PARTS)} if self._parts else {}
        return any(there.get(name) != version for name, version in self._parts.items())

    def _new_parts(self) -> Iterator[bytes]:
        for entry in sorted(self._store.list(PARTS), key=lambda entry: str(entry.name)):
            if entry.name not in self._parts:
                content = self._store.read(entry.name)
                self._parts[entry.name] = entry.version
                self.bytes += len(content)
                yield content if content.endswith(b"\n") else content + b"\n"
