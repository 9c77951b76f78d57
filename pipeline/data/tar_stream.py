"""A tar that arrives as a stream, plain or compressed: its regular files in order, in the memory of one of them.

Python's tarfile takes a damaged header for the end of a stream, does not check gzip's sums, and reads extended headers
of any size. Here a tar is either read to its end mark or known to be damaged.

Formats: V7, ustar, POSIX.1-2001 pax, GNU long names and base-256 sizes; gzip, bzip2 and xz, of several streams too.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from pipeline.errors import DataError

BLOCK = 512
_CHUNK = 1 << 20  # bytes read at once
_LONGEST_HEADER = 1 << 20  # of pax records or a GNU long name: file names take a few hundred bytes
_XZ_MEMORY = 256 << 20  # `xz -9` takes 65 MiB; a header may ask for 4 GiB
_END = bytes(BLOCK)
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # links, devices, folders, pipes, whatever their size
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"
_EXTENDED = frozenset((_PAX, b"X", _PAX_GLOBAL, _GNU_NAME, _GNU_LINK))  # X: Solaris' pax


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
        new = None if _is_header(head) else _decoder(head)
        if new:
            self._buffer, self._read = b"", _Decompressed(head, stream.read, new).read
        self._left = self._padding = 0  # of the current file's content

    def __iter__(self) -> Iterator[tuple[str, int]]:
        pax: dict[bytes, bytes] = {}
        shared: dict[bytes, bytes] = {}  # pax records for all members that follow
        long_name = b""
        while True:
            header = self._take(BLOCK)
            if header == _END:
                break
            if not _is_header(header):
                raise _damaged("a header is damaged" if len(header) == BLOCK else "there is no end mark")
            size, kind = _number(header[124:136]), header[156:157]
            if kind in _EXTENDED:
                records = self._extended(size)
                if kind == _PAX_GLOBAL:
                    shared.update(_pax_records(records))
                elif kind == _GNU_NAME:
                    long_name = records.partition(b"\0")[0]
                elif kind != _GNU_LINK:
                    pax = _pax_records(records)
                continue
            if shared:
                pax = shared | pax
            name = pax.get(b"path") or long_name or _header_name(header)
            if b"size" in pax:
                size = _number(pax[b"size"], base=10)
            if kind == _GNU_SPARSE:
                self._pass_sparse_map(header)
            self._left = 0 if kind in _WITHOUT_DATA else size
            self._padding = -self._left % BLOCK
            sparse = bool(pax) and any(key.startswith(b"GNU.sparse.") for key in pax)
            if kind in _REGULAR and not sparse and not name.endswith(b"/"):
                yield name.decode("utf-8", "surrogateescape"), size
            self._pass_over(self._left + self._padding)
            pax, long_name = {}, b""
        if pax or long_name:
            raise _damaged("it ends within a member")
        self._check_rest()

    def read(self) -> bytes:
        """The content of the file just named; a second call gives nothing."""
        data = self._take(self._left)
        if len(data) < self._left:
            raise _damaged("it ends within a member")
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
                raise _damaged("it ends within a member")
        self._at += size

    def _extended(self, size: int) -> bytes:
        """The content of a header that says something about the next member."""
        if size > _LONGEST_HEADER:
            raise _damaged("an extended header is too long")
        data = self._take(size)
        self._pass_over(-size % BLOCK)
        return data

    def _pass_sparse_map(self, header: bytes) -> None:
        """GNU's old sparse files have blocks of their own between header and content; a flag says that one follows."""
        more = header[482]
        while more:
            block = self._take(BLOCK)
            if len(block) < BLOCK:
                raise _damaged("it ends within a member")
            more = block[504]

    def _check_rest(self) -> None:
        """Nothing but padding may follow the end mark: samples behind a block of zeros would be lost unseen."""
        rest = self._buffer[self._at :]
        self._buffer, self._at = b"", 0
        while True:
            if rest.strip(b"\0"):
                raise _damaged("it goes on after its end mark")
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
        self._pending, self._read, self._new = head, read, new
        self._decoder = new()

    def read(self, size: int) -> bytes:
        while True:
            if self._decoder.eof and not self._next_stream():
                return b""
            data = b""
            if self._decoder.needs_input:
                data, self._pending = self._pending or self._read(_CHUNK), b""
            starved = self._decoder.needs_input and not data
            try:
                decoded = self._decoder.decompress(data, size)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise _damaged("its compression is damaged") from error
            if decoded:
                return decoded
            if starved and not self._decoder.eof:
                raise _damaged("its compression is cut short")

    def _next_stream(self) -> bool:
        """Compressed files may be joined, with zeros between them and at the end."""
        rest = self._decoder.unused_data
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._read(_CHUNK)):
                return False
        self._pending, self._decoder = rest, self._new()
        return True


def _decoder(head: bytes) -> Callable[[], _Decoder] | None:
    """What takes apart a file that begins so; None for what is not compressed."""
    if head.startswith(b"\x1f\x8b\x08"):
        return _Gzip
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if head.startswith(b"\xfd7zXZ\0"):
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return None


def _is_header(block: bytes) -> bool:
    """Whether the block's checksum holds; old tars summed signed bytes."""
    if len(block) < BLOCK:
        return False
    try:
        told = _number(block[148:156])
    except DataError:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return told == total or told == total - 256 * sum(b > 127 for b in block[:148] + block[156:])


def _number(field: bytes, base: int = 8) -> int:
    """Digits, or base-256 where the first byte says so (GNU, for sizes from 8 GiB)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit() or len(digits) > 40:
        raise _damaged("a header is damaged")
    try:
        return int(digits, base)
    except ValueError as error:
        raise _damaged("a header is damaged") from error


def _header_name(header: bytes) -> bytes:
    """The name field, after ustar's prefix (GNU's own magic has other fields there)."""
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n` records, LENGTH counting all of it (POSIX.1-2001)."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise _damaged("a pax header is damaged")
        records[key] = value[:-1]
        at = end
    return records


def _damaged(what: str) -> DataError:
    return DataError(f"the tar cannot be read: {what}", "the file is damaged or cut short: fetch or write it again")
