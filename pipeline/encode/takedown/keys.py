"""The samples that were taken down: `lathe remove` notes them beside the manifest, `lathe encode` leaves them out.

`removed.txt` has one sample a line: KEY, in whichever image shard, or SHARD<TAB>KEY for one shard's alone.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping

from pipeline.data.manifest import REMOVED, Receipt, key_hash
from pipeline.errors import DataError
from pipeline.storage import Store

REASON = "removed"


class Takedown:
    """A set of samples, by key or by source shard and key.

    Args:
        lines: as in the file; empty ones are passed over.

    Raises:
        DataError: a line is not UTF-8.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = {line.strip("\r\n") for line in lines} - {""}
        self._keys: dict[int, str] = {}  # of every shard, by hash
        self._in_shard: dict[str, dict[int, str]] = {}
        for line in self._lines:
            shard, tab, key = line.partition("\t") if "\t" in line else ("", "", line)
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{line!r} is no key: it is not UTF-8", "give keys as UTF-8") from error
            (self._in_shard.setdefault(shard, {}) if tab else self._keys)[key_hash(key)] = key

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __or__(self, other: Takedown) -> Takedown:
        return Takedown(self._lines | other._lines)

    def holds(self, source: str, key: str) -> bool:
        """Whether a sample of the image shard `source` was taken down."""
        return key in self._lines or f"{source}\t{key}" in self._lines

    def touches(self, receipt: Receipt) -> bool:
        """Whether a latent shard still holds one of the samples."""
        hashes = receipt.hashes() if self._lines else ()
        there = self._in_shard.get(receipt.source, {})
        return not (self._keys.keys().isdisjoint(hashes) and there.keys().isdisjoint(hashes))

    def keys(self, source: str) -> Mapping[int, str]:
        """Keys that were taken down from the image shard `source`, by the hash that receipts know them by."""
        there = self._in_shard.get(source)
        return ChainMap(there, self._keys) if there else self._keys

    def to_bytes(self) -> bytes:
        """The file: sorted lines, UTF-8."""
        return "".join(f"{line}\n" for line in sorted(self._lines)).encode("utf-8")


def read_takedown(store: Store) -> Takedown:
    """What was taken down from this output; nothing, where there is no such file.

    Raises:
        DataError: the file is not UTF-8.
        StorageError: it cannot be read.
    """
    if not store.exists(REMOVED):
        return Takedown()
    try:
        return Takedown(store.read(REMOVED).decode("utf-8-sig").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{store.url}: {REMOVED} is not UTF-8", "save it as UTF-8, one key a line") from error
