"""A file of any store as a stream that is fetched ahead of its reader."""

from __future__ import annotations

import hashlib
import io
import threading
from typing import BinaryIO

from pipeline.storage.base import OpenFile
from pipeline.storage.urls import open_store, split

_PART_BYTES = 8 * 2**20
_PARTS_AHEAD = 3


def open_stream(url: str, *, part_bytes: int = _PART_BYTES, parts_ahead: int = _PARTS_AHEAD) -> Stream:
    """A file of any store, to be read once from its beginning to its end; close it, or use it in a `with`.

    Threads of its own fetch the next parts, so that at most `parts_ahead + 1` parts are in memory.

    Args:
        url: the file's address.
        part_bytes: bytes asked for at once.
        parts_ahead: how many parts are fetched ahead of the reader.

    Raises:
        StorageError: it is not there, or the store does not answer. Reading raises it too, also where the file
            changes while it is read.
    """
    if part_bytes < 1 or parts_ahead < 1:
        raise ValueError(f"part_bytes={part_bytes} and parts_ahead={parts_ahead} must be positive")
    parent, name = split(url)
    return Stream(url, open_store(parent).open(name), part_bytes, parts_ahead)


class Stream(io.BufferedIOBase, BinaryIO):
    """A sequential reader. All that it gives is of one version of the file, or it raises StorageError.

    Attributes:
        size: the file's bytes.
        version: the file's version, as `Entry.version`.
        bytes_read: how many bytes have been read so far.
    """

    def __init__(self, url: str, file: OpenFile, part_bytes: int, parts_ahead: int) -> None:
        super().__init__()
        self.size, self.version, self.bytes_read = file.size, file.version, 0
        self._url = url
        self._parts = _PartsAhead(file, part_bytes, parts_ahead)
        self._part = memoryview(b"")
        self._position = self._hashed = 0  # in this part
        self._hash = hashlib.sha256()

    @property
    def name(self) -> str:
        """The file's address."""
        return self._url

    @property
    def mode(self) -> str:
        """Always `rb`."""
        return "rb"

    def readable(self) -> bool:
        """Always true; it is neither writable nor seekable."""
        return True

    def tell(self) -> int:
        """As `bytes_read`."""
        return self.bytes_read

    def read(self, size: int | None = -1, /) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left by default. Raises StorageError."""
        self._check_open()
        left = self.size - self.bytes_read
        wanted = left if size is None or size < 0 else min(size, left)
        pieces = []
        while wanted:
            piece = self.read1(wanted)
            pieces.append(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int = -1, /) -> bytes:
        """At most `size` of the next bytes, without waiting for a second part. Raises StorageError."""
        self._check_open()
        if self._position == len(self._part) and self.bytes_read < self.size:
            self._digest()
            self._part, self._position, self._hashed = memoryview(b""), 0, 0  # freed before the next is waited for
            self._part = memoryview(self._parts.take())
        end = len(self._part) if size < 0 else min(self._position + size, len(self._part))
        piece = bytes(self._part[self._position : end])
        self._position = end
        self.bytes_read += len(piece)
        return piece

    def sha256(self) -> str:
        """SHA-256 of all bytes read so far, in hexadecimal."""
        self._digest()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Stop fetching, and let go of what was fetched. `sha256` still answers."""
        if not self.closed:
            self._digest()
            self._part, self._position, self._hashed = memoryview(b""), 0, 0
            self._parts.stop()
        super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("read of a closed stream")

    def _digest(self) -> None:
        self._hash.update(self._part[self._hashed : self._position])  # late, since many small updates are slow
        self._hashed = self._position


class _PartsAhead:
    """The parts of a file in order, fetched by threads that stay a few parts ahead of `take`.

    The threads know nothing of the stream, so that a forgotten stream is collected and stops them. They are
    daemons: a process may end while a store is silent.
    """

    def __init__(self, file: OpenFile, part_bytes: int, parts_ahead: int) -> None:
        self._file = file
        self._part_bytes = part_bytes
        self._parts_ahead = parts_ahead
        self._count = -(-file.size // part_bytes)
        self._begun = self._taken = 0
        self._stopped = False
        self._fetched: dict[int, bytes | Exception] = {}
        self._changed = threading.Condition()
        self._running = min(parts_ahead, self._count)
        if not self._running:
            file.close()
        for _ in range(self._running):
            threading.Thread(target=self._fetch_all, name="lathe-stream", daemon=True).start()

    def take(self) -> bytes:
        """The next part, once it is there. Raises what fetching it raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._taken in self._fetched)
            if self._stopped:
                raise ValueError("the stream was closed while it was read")
            part = self._fetched[self._taken]
            if isinstance(part, Exception):
                raise part
            del self._fetched[self._taken]
            self._taken += 1
            self._changed.notify_all()
            return part

    def stop(self) -> None:
        """Begin no more requests, and forget what was fetched."""
        with self._changed:
            self._stopped = True
            self._fetched.clear()
            self._changed.notify_all()

    def _fetch_all(self) -> None:
        while (number := self._next()) is not None:
            start = number * self._part_bytes
            try:
                self._put(number, self._file.read(start, start + self._part_bytes))
            except Exception as error:  # told to the reader when it comes to this part
                self._put(number, error)
        with self._changed:
            self._running -= 1
            if not self._running:
                self._file.close()

    def _next(self) -> int | None:
        def may_begin() -> bool:
            return self._stopped or self._begun == self._count or self._begun < self._taken + self._parts_ahead

        with self._changed:
            self._changed.wait_for(may_begin)
            if self._stopped or self._begun == self._count:
                return None
            self._begun += 1
            return self._begun - 1

    def _put(self, number: int, part: bytes | Exception) -> None:
        with self._changed:
            if isinstance(part, Exception):
                self._begun = self._count  # no more requests
            if not self._stopped:
                self._fetched[number] = part
            self._changed.notify_all()
