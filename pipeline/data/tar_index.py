"""The members of a run of a tar, found at once.

A block of latents has hundreds of members, and reading their headers in turn takes longer than all else that is done
with it. Headers as `TarBuilder` writes them are found, checked and read together here; whatever is not quite so is
left to `tar.members`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.tar import members
from pipeline.data.tar_header import BLOCK, LONGEST_EXTENDED, Headers

Integers = NDArray[np.int64]
Members = tuple[list[str], Integers, Integers]

_MAGIC = int.from_bytes(b"ustar\x0000", "little")
_REGULAR, _PAX = b"0x"
_ZERO, _SEVEN = b"07"
_NAME = 100  # bytes of the name field, with which headers begin
_PREFIX = 345  # where ustar's field of that name begins: long names may stand in both
_POWERS = 8.0 ** np.arange(10, -1, -1)
_LANES = np.uint64(0x00FF00FF00FF00FF)


def find_members(data: bytes | memoryview) -> Members:
    """The regular files of any run of whole members cut out of a tar: `tar.members`, many times as fast.

    Returns:
        names; where each one's content begins in `data`; bytes of each content.

    Raises:
        DataError: a header is damaged, or the data end within a member.
    """
    try:
        return _at_once(memoryview(data))
    except _UnusualError:
        rows = list(members(data))
    places = np.array([row[1:] for row in rows], np.int64).reshape(-1, 2)
    return [name for name, _, _ in rows], places[:, 0], places[:, 1]


class PlainMembers(NamedTuple):
    """Members that all have plain ustar headers."""

    names: NDArray[np.uint8]  # [m, 100], with zeros behind each name
    starts: Integers  # [m] first byte of each content
    sizes: Integers  # [m] bytes of each content


def plain_members(data: memoryview) -> PlainMembers | None:
    """The regular files of a run of whole members, whose headers are known to be undamaged.

    Returns:
        None where headers are not as `TarBuilder` writes them, or names are not told by them alone.
    """
    try:
        headers, starts, sizes = _headers(data)
    except _UnusualError:
        return None
    return PlainMembers(headers[:, :_NAME], starts, sizes) if (headers[:, 156] == _REGULAR).all() else None


def plain_names(names: NDArray[np.uint8]) -> list[str] | None:
    """The name fields [m, 100] as strings; None where one is a folder's, or goes on behind a zero."""
    try:
        return _names(names)
    except _UnusualError:
        return None


class _UnusualError(Exception):
    """The headers are not as `TarBuilder` writes them."""


def _headers(data: memoryview) -> tuple[NDArray[np.uint8], Integers, Integers]:
    """Ustar headers [m, 512] that follow upon each other, first bytes and sizes of contents. Raises _UnusualError."""
    count, rest = divmod(len(data), BLOCK)
    _require(count > 0 and rest == 0)
    at = np.flatnonzero(np.ndarray((count,), "<u8", data, 257, (BLOCK,)) == _MAGIC)
    _require(len(at) > 0 and at[0] == 0)
    headers = np.frombuffer(data, np.uint8).reshape(count, BLOCK)[at]
    sizes = _octal(headers[:, 124:136], 11)
    ends = at + 1 + (sizes + (BLOCK - 1)) // BLOCK
    _require(ends[-1] == count and np.array_equal(ends[:-1], at[1:]))
    _require(not headers[:, _PREFIX].any())
    return headers, (at + 1) * BLOCK, sizes


def _at_once(data: memoryview) -> Members:
    """The members where all headers are plain ustar, or pax for a name. Raises _UnusualError, DataError."""
    headers, starts, sizes = _headers(data)
    _require(np.array_equal(_sums(headers), _octal(headers[:, 148:155], 6)))
    regular = headers[:, 156] == _REGULAR
    _require((regular | (headers[:, 156] == _PAX)).all())
    names = _names(headers[:, :_NAME])
    if regular.all():
        return names, starts, sizes
    for number in np.flatnonzero(~regular).tolist():
        names[number + 1 : number + 2] = [_long_name(data, starts, sizes, regular, number)]
    return [name for name, kept in zip(names, regular.tolist(), strict=True) if kept], starts[regular], sizes[regular]


def _names(names: NDArray[np.uint8]) -> list[str]:
    fields: list[bytes] = np.ascontiguousarray(names).view(f"S{_NAME}")[:, 0].tolist()
    joined = b"\0".join(fields)
    _require(b"/\0" not in joined and not joined.endswith(b"/"))  # a folder
    found = joined.decode("utf-8", "surrogateescape").split("\0")
    _require(len(found) == len(names))  # else something stands behind the end of a name
    return found


def _long_name(data: memoryview, starts: Integers, sizes: Integers, regular: NDArray[np.bool_], number: int) -> str:
    """What the pax header `number` calls the member behind it."""
    following, size = number + 1, int(sizes[number])
    _require(following < len(starts) and bool(regular[following]) and size <= LONGEST_EXTENDED)
    headers, start = Headers(), int(starts[number])
    headers.extend(b"x", bytes(data[start : start + size]))
    behind = int(starts[following])
    name, size = headers.member(bytes(data[behind - BLOCK : behind]))
    if name is None or size != sizes[following]:
        raise _UnusualError
    return name


def _octal(fields: NDArray[np.uint8], digits: int) -> Integers:
    """Numbers of so many octal digits with a zero byte behind them."""
    figures = fields[:, :digits]
    _require(not fields[:, digits].any() and bool(((figures >= _ZERO) & (figures <= _SEVEN)).all()))
    values: NDArray[np.float64] = (figures - _ZERO).astype(np.float64) @ _POWERS[-digits:]  # exact below 2^53
    return values.astype(np.int64)


def _sums(headers: NDArray[np.uint8]) -> Integers:
    """Checksum of each header: the sum of its bytes, with blanks in the checksum's own place."""
    words = headers.view("<u8")
    lanes = ((words & _LANES) + (words >> 8 & _LANES)).sum(1)  # 4 sums of 16 bits, each below 2^15
    sums = lanes.view("<u2").reshape(-1, 4).sum(1, dtype=np.int64)
    result: Integers = sums - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    return result


def _require(usual: bool | np.bool_) -> None:
    if not usual:
        raise _UnusualError
