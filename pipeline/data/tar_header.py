"""Headers of a tar, for both of its readers: sums, numbers, names, and what extended headers say of the next member.

Formats: V7, ustar, POSIX.1-2001 pax, GNU long names and base-256 numbers, as tarfile, GNU tar and bsdtar write them.
"""

from __future__ import annotations

from pipeline.errors import DataError

BLOCK = 512
END = bytes(BLOCK)
GNU_SPARSE = b"S"
LONGEST_EXTENDED = 1 << 20  # bytes of pax records or a GNU long name: file names take a few hundred
_PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"g", b"L", b"K"
EXTENDED = frozenset((b"x", b"X", _PAX_GLOBAL, _GNU_NAME, _GNU_LINK))  # X: Solaris' pax
_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))  # links, devices, folders, pipes, whatever their size
_SPARSE = b"GNU.sparse."


class Headers:
    """The headers of one tar in turn. What extended ones say is kept for the member behind them."""

    def __init__(self) -> None:
        self._pax: dict[bytes, bytes] = {}
        self._shared: dict[bytes, bytes] = {}  # for all members that follow
        self._long_name = b""
        self.pending = False  # a member must follow

    def extend(self, kind: bytes, data: bytes) -> None:
        """Take in the content of a header whose kind is in EXTENDED. Raises DataError."""
        if kind == _PAX_GLOBAL:
            self._shared |= _pax_records(data)
            return
        self.pending = True
        if kind == _GNU_NAME:
            self._long_name = data.partition(b"\0")[0]
        elif kind != _GNU_LINK:
            self._pax = _pax_records(data)

    def member(self, header: bytes) -> tuple[str | None, int]:
        """Name of the member that this header begins, None where it is no regular file, and bytes of its content.

        Bytes of a name that are not UTF-8 are surrogate escapes. Raises DataError.
        """
        kind, size = header[156:157], number(header[124:136])
        name, sparse = _name(header), False
        if self.pending or self._shared:
            pax = self._shared | self._pax
            name = pax.get(b"path") or self._long_name or name
            size = number(pax[b"size"], base=10) if b"size" in pax else size
            sparse = _SPARSE in pax
            self._pax, self._long_name, self.pending = {}, b"", False
        if kind in _WITHOUT_DATA:
            return None, 0
        if kind not in _REGULAR or sparse or name.endswith(b"/"):
            return None, size
        return name.decode("utf-8", "surrogateescape"), size


def is_header(block: bytes) -> bool:
    """Whether the block's checksum holds; old tars summed signed bytes."""
    if len(block) < BLOCK:
        return False
    try:
        told = number(block[148:156])
    except DataError:
        return False
    total = sum(block.translate(None, b"\0")) - sum(block[148:156]) + 8 * ord(" ")  # most are zeros
    return told == total or told == total - 256 * sum(b > 127 for b in block[:148] + block[156:])


def number(field: bytes, base: int = 8) -> int:
    """Digits, or base-256 where the first byte says so (GNU, for sizes from 8 GiB). Raises DataError."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip() or b"0"
    if not digits.isdigit() or len(digits) > 40:
        raise damaged("a header is damaged")
    try:
        return int(digits, base)
    except ValueError as error:
        raise damaged("a header is damaged") from error


def damaged(what: str) -> DataError:
    """The error about a tar that is not as it was written; `what` is a clause."""
    return DataError(f"the tar cannot be read: {what}", "the file is damaged or cut short: fetch or write it again")


def _name(header: bytes) -> bytes:
    """The name field, after ustar's prefix (GNU's own magic has other fields there)."""
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n` records, LENGTH counting all of it (POSIX.1-2001): path, size, and whether it is sparse."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise damaged("a pax header is damaged")
        if key in (b"path", b"size"):
            records[key] = value[:-1]
        elif key.startswith(_SPARSE):
            records[_SPARSE] = b""
        at = end
    return records
