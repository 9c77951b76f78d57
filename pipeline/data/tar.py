"""Tar archives in memory: a writer whose bytes depend on names and contents alone, and a reader in place."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.tar_header import BLOCK, EXTENDED, GNU_SPARSE, LONGEST_EXTENDED, Headers, damaged, is_header, number
from pipeline.errors import DataError


class TarBuilder:
    """Builds one archive; mtime, uid, gid, owner and mode are fixed, long or non-ASCII names go through pax headers."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def size(self) -> int:
        """Bytes so far: where the next member's header will stand."""
        return len(self._buffer)

    def add(self, name: str, data: bytes) -> int:
        """Append a regular file.

        Args:
            name: path within the archive.
            data: its content.

        Returns:
            The offset of the member's first header, in bytes.

        Raises:
            UnicodeEncodeError: UTF-8 cannot say the name.
        """
        name.encode("utf-8")
        offset = len(self._buffer)
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o444
        self._buffer += info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        self._buffer += data
        self._buffer += bytes(-len(data) % BLOCK)
        return offset

    def take(self, other: TarBuilder) -> None:
        """Move all members of another builder behind one's own. The first to be moved is not copied."""
        if self._buffer:
            self._buffer += other._buffer
            other._buffer = bytearray()
        else:
            self._buffer, other._buffer = other._buffer, self._buffer

    def crc32(self, start: int) -> int:
        """Checksum of the bytes from `start` on."""
        with memoryview(self._buffer) as view, view[start:] as part:
            return zlib.crc32(part)

    def finish(self) -> memoryview:
        """The whole archive with its end mark, not copied; nothing can be added while it is in use."""
        self._buffer += bytes(2 * BLOCK)
        return memoryview(self._buffer).toreadonly()


def members(data: bytes | memoryview, *, whole: bool = False) -> Iterator[tuple[str, int, int]]:
    """The regular files of an archive, or of any run of whole members cut out of one.

    Args:
        data: bytes that begin at a header.
        whole: the end mark must be there.

    Yields:
        (name, offset of the content in `data`, size in bytes), in file order.

    Raises:
        DataError: a header is damaged, or the data end within a member.
    """
    view = memoryview(data)
    return members_at(lambda start, end: bytes(view[start:end]), len(view), whole=whole)


def members_at(
    read: Callable[[int, int], bytes], length: int, *, whole: bool = False
) -> Iterator[tuple[str, int, int]]:
    """As `members`, of `length` bytes somewhere else: `read(start, end)` is asked for headers alone."""
    at, headers = 0, Headers()
    while at < length:
        header = read(at, at + BLOCK)
        if not any(header):
            break
        if not is_header(header):
            raise damaged(f"the header at byte {at:,} is damaged")
        name, kind, start = None, header[156:157], at + BLOCK
        if kind in EXTENDED:
            size = number(header[124:136])
        else:
            name, size = headers.member(header)
            start += _sparse_map(read, header, start)
        if start + size > length:
            raise damaged(f"it ends within the member at byte {at:,}")
        if kind in EXTENDED:
            if size > LONGEST_EXTENDED:
                raise damaged("an extended header is too long")
            headers.extend(kind, read(start, start + size))
        elif name is not None:
            yield name, start, size
        at = start + size + -size % BLOCK
    else:
        if whole:
            raise damaged("there is no end mark")
    if headers.pending:
        raise damaged("it ends within a member")


def _sparse_map(read: Callable[[int, int], bytes], header: bytes, start: int) -> int:
    """Bytes between the header of an old GNU sparse file and its content: blocks, each with a flag for another."""
    size, more = 0, header[156:157] == GNU_SPARSE and header[482]
    while more:
        block = read(start + size, start + size + BLOCK)
        if len(block) < BLOCK:
            raise damaged("it ends within a member")
        size, more = size + BLOCK, block[504]
    return size


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """The array as a .npy file, C order."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_npy(data: bytes | memoryview) -> npt.NDArray[Any]:
    """The array of a .npy file, a read-only view of `data`; nothing is unpickled.

    Raises:
        DataError: not .npy, of Python objects, or its length does not fit its header.
    """
    view = memoryview(data)
    try:
        wide = view[6] > 1
        length = struct.unpack_from("<I" if wide else "<H", view, 8)[0] + (12 if wide else 10)
        dtype, shape, fortran = _npy_header(bytes(view[:length]))
        array = np.frombuffer(view, dtype, offset=length)
        return array.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # numpy leaves headers to Python's own parser, which fails in many ways
        said = " ".join(str(error).split())[:200]
        raise DataError(f"an array could not be read: {said}", "the shard is damaged: encode it again") from error


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Parsed once per distinct header: a shard's arrays share theirs."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return dtype, shape, fortran
