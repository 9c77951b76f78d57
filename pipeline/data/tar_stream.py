"""A tar that arrives as a stream, plain or compressed: its regular files in order, in the memory of one of them.

Python's tarfile takes a damaged header for the end of a stream, does not check gzip's sums, and reads extended headers
of any size. Here a tar is either read to its end mark or known to be damaged.

Formats: those of `tar_header`; gzip, bzip2 and xz, of several streams too. What unpacks to far more than pictures do is
damaged: a megabyte could keep a worker busy for hours.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from pipeline.data.tar_header import (
    BLOCK,
    END,
    EXTENDED,
    GNU_SPARSE,
    LONGEST_EXTENDED,
    Headers,
    damaged,
    is_header,
    number,
)

_CHUNK = 1 << 20  # bytes read at once
_XZ_MEMORY = 256 << 20  # `xz -9` takes 65 MiB; a header may ask for 4 GiB
_UNPACKED = 64 << 20  # bytes that any compressed tar may become, and
_RATIO = 100  # times its own: pictures hardly shrink, 45 bytes of bzip2 can be 45 MB of zeros
_PIECE = 16 << 10  # of compressed bytes: a joined file that begins in it copies the rest of it


class TarStream:
    """The regular files of one tar; links, folders, devices and sparse files are passed over.

    Iterate for (name, size); `read` gives the content of the file just named. Bytes of a name that are not UTF-8 are
    surrogate escapes. The stream is read to its end and not closed.

    Args:
        stream: the tar from its first byte; nothing but `read(size)` is asked of it.

    Raises:
        DataError: while iterating or reading, when the tar is damaged, cut short, or goes on after its end mark.
        Whatever else the stream raises is passed on.
    """

    def __init__(self, stream: BinaryIO) -> None:
        head = b""
        while len(head) < BLOCK and (more := stream.read(BLOCK - len(head))):
            head += more
        self._buffer, self._at = head, 0
        self._read: Callable[[int], bytes] = stream.read
        new = None if is_header(head) else _decoder(head)
        if new:
            self._buffer, self._read = b"", _Decompressed(head, stream.read, new).read
        self._left = self._padding = 0  # of the current file's content

    def __iter__(self) -> Iterator[tuple[str, int]]:
        headers = Headers()
        while (header := self._take(BLOCK)) != END:
            if not is_header(header):
                raise damaged("a header is damaged" if len(header) == BLOCK else "there is no end mark")
            if (kind := header[156:157]) in EXTENDED:
                headers.extend(kind, self._extended(number(header[124:136])))
                continue
            if kind == GNU_SPARSE:
                self._pass_sparse_map(header)
            name, self._left = headers.member(header)
            self._padding = -self._left % BLOCK
            if name is not None:
                yield name, self._left
            self._pass_over(self._left + self._padding)
        if headers.pending:
            raise damaged("it ends within a member")
        self._check_rest()

    def read(self) -> bytes:
        """The content of the file just named; a second call gives nothing."""
        data = self._take(self._left)
        if len(data) < self._left:
            raise damaged("it ends within a member")
        self._left = 0
        return data

    def _take(self, size: int) -> bytes:
        """The next `size` bytes, fewer where the stream ends."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        parts = [self._buffer[self._at :]]
        missing = size - len(parts[0])
        self._buffer, self._at = b"", 0
        while missing > 0 and (chunk := self._read(_CHUNK)):
            if len(chunk) > missing:
                self._buffer, self._at = chunk, missing
                chunk = chunk[:missing]
            parts.append(chunk)
            missing -= len(chunk)
        return b"".join(parts)

    def _pass_over(self, size: int) -> None:
        held = len(self._buffer) - self._at
        while size > held:
            size -= held
            self._buffer, self._at = self._read(_CHUNK), 0
            held = len(self._buffer)
            if not held:
                raise damaged("it ends within a member")
        self._at += size

    def _extended(self, size: int) -> bytes:
        """The content of a header that says something about the next member."""
        if size > LONGEST_EXTENDED:
            raise damaged("an extended header is too long")
        data = self._take(size)
        self._pass_over(-size % BLOCK)
        return data

    def _pass_sparse_map(self, header: bytes) -> None:
        """GNU's old sparse files have blocks of their own between header and content; a flag says that one follows."""
        more = header[482]
        while more:
            block = self._take(BLOCK)
            if len(block) < BLOCK:
                raise damaged("it ends within a member")
            more = block[504]

    def _check_rest(self) -> None:
        """Nothing but padding may follow the end mark: samples behind a block of zeros would be lost unseen."""
        rest = self._buffer[self._at :]
        self._buffer, self._at = b"", 0
        while True:
            if rest.strip(b"\0"):
                raise damaged("it goes on after its end mark")
            if not (rest := self._read(_CHUNK)):
                return


class _Decoder(Protocol):
    """What the decompressors of bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor with their interface; it checks gzip's header, length and sum."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Decompressed:
    """`read` of what `head` and the rest of a compressed stream hold; like it, it may give less than was asked for."""

    def __init__(self, head: bytes, read: Callable[[int], bytes], new: Callable[[], _Decoder]) -> None:
        self._pending, self._more, self._new = head, read, new
        self._decoder = new()
        self._left = _UNPACKED + _RATIO * len(head)  # bytes that may still come out

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof and not self._next_stream():
                return b""
            data = b""
            if self._decoder.needs_input:
                data, self._pending = self._pending or self._read(), b""
            starved = self._decoder.needs_input and not data
            try:
                decoded = self._decoder.decompress(data, size)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise damaged("its compression is damaged") from error
            if decoded:
                self._left -= len(decoded)
                if self._left < 0:
                    raise damaged("it unpacks to far more than pictures do")
                return decoded
            if starved and not self._decoder.eof:
                raise damaged("its compression is cut short")

    def _next_stream(self) -> bool:
        """Compressed files may be joined, with zeros between them and at the end."""
        rest = self._decoder.unused_data
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._read()):
                return False
        self._pending, self._decoder = rest, self._new()
        return True

    def _read(self) -> bytes:
        data = self._more(_PIECE)
        self._left += _RATIO * len(data)
        return data


def _decoder(head: bytes) -> Callable[[], _Decoder] | None:
    """What takes apart a file that begins so; None for what is not compressed."""
    if head.startswith(b"\x1f\x8b\x08"):
        return _Gzip
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\0"):
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return None
