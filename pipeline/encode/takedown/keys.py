"""The samples that were taken down: `lathe remove` notes them beside the manifest, `lathe encode` leaves them out.

`removed.txt` has one sample a line: KEY, in whichever image shard, or SHARD<TAB>KEY for one shard's alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.data.manifest import REMOVED, Receipt, key_hash
from pipeline.errors import DataError
from pipeline.storage import Store

REASON = "removed"


class Takedown:
    """A set of samples, by key or by source shard and key.

    Args:
        lines: as in the file; empty ones are passed over.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._lines = {line.strip("\r\n") for line in lines} - {""}
        self._anywhere = {line for line in self._lines if "\t" not in line}
        self._in_shard: dict[str, set[str]] = {}
        for line in self._lines - self._anywhere:
            shard, _, key = line.partition("\t")
            self._in_shard.setdefault(shard, set()).add(key)
        self._hashes = {key_hash(key): key for key in self._anywhere}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def __or__(self, other: Takedown) -> Takedown:
        return Takedown(self._lines | other._lines)

    def holds(self, source: str, key: str) -> bool:
        """Whether a sample of the image shard `source` was taken down."""
        return key in self._anywhere or key in self._in_shard.get(source, ())

    def touches(self, receipt: Receipt) -> bool:
        """Whether a latent shard still holds one of the samples."""
        if not self._lines:
            return False
        return not self.keys(receipt.source).keys().isdisjoint(receipt.hashes())

    def keys(self, source: str) -> dict[int, str]:
        """Keys that were taken down from the image shard `source`, by the hash that receipts know them by."""
        there = self._in_shard.get(source)
        return self._hashes | {key_hash(key): key for key in there} if there else self._hashes

    def to_bytes(self) -> bytes:
        """The file: sorted lines, UTF-8."""
        return "".join(f"{line}\n" for line in sorted(self._lines)).encode("utf-8", "surrogateescape")


def read_takedown(store: Store) -> Takedown:
    """What was taken down from this output; nothing, where there is no such file.

    Raises:
        DataError: the file is not UTF-8.
        StorageError: it cannot be read.
    """
    if not store.exists(REMOVED):
        return Takedown()
    try:
        return Takedown(store.read(REMOVED).decode("utf-8").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{store.url}: {REMOVED} is not UTF-8", "save it as UTF-8, one key a line") from error
