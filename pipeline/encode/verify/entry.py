"""One entry of the manifest: is its receipt what it says, is its shard?"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from pipeline.data.fold import shard_entry
from pipeline.data.manifest import Receipt, ShardEntry, load_receipt
from pipeline.encode.takedown.keys import Takedown
from pipeline.encode.verify.files import Sizes
from pipeline.encode.verify.report import Notes
from pipeline.encode.verify.shard import ShardCheck
from pipeline.encode.verify.text import Texts
from pipeline.errors import LatheError, StorageError
from pipeline.storage import Store, open_stream

_PIECE = 1 << 20


@dataclass
class Looked:
    """What one shard gave."""

    notes: Notes = field(default_factory=Notes)
    receipt: Receipt | None = None  # where it is usable
    hashes: array[int] = field(default_factory=lambda: array("Q"))  # of the keys found; without reading, those noted
    bytes: int = 0
    numbers: int = 0
    captions: int = 0


class EntryCheck:
    """Holds receipts and shards against the manifest.

    Args:
        texts: what all shards must be like, and their captions.
        store: the manifest's folder.
        sizes: of the files there.
        takedown: the samples that must be gone.
        quick: the shards are not read.
    """

    def __init__(self, texts: Texts, store: Store, sizes: Sizes, takedown: Takedown, *, quick: bool) -> None:
        self._texts, self._store, self._sizes = texts, store, sizes
        self._takedown, self._quick = takedown, quick
        self._manifest = texts.manifest
        self._digest = texts.manifest.fingerprint.digest()

    def look(self, entry: ShardEntry) -> Looked:
        """Look at one entry; runs beside others."""
        looked = Looked()
        self._check_receipt(entry, looked)
        there = self._sizes.get(entry.name)
        if there != entry.bytes:
            said = "missing" if there is None else f"{there} bytes, the manifest says {entry.bytes}"
            looked.notes.add("files", f"{entry.name}: {said}")
        if looked.receipt is not None:
            looked.hashes = looked.receipt.hashes()
        if there is not None and not self._quick:
            try:
                self._read_through(entry, looked)
            except StorageError as error:
                looked.notes.add("files", f"{entry.name}: {error.message}")
        return looked

    def _check_receipt(self, entry: ShardEntry, looked: Looked) -> None:
        notes = looked.notes
        if entry.receipt not in self._sizes:
            notes.add("receipts", f"{entry.receipt}: missing")
            return
        try:
            receipt = load_receipt(self._store, entry.receipt)
        except LatheError as error:
            notes.add("receipts", error.message)
            return
        found = shard_entry(receipt)
        for name in ShardEntry.model_fields:
            if (one := getattr(found, name)) != (other := getattr(entry, name)):
                notes.add("receipts", f"{entry.receipt}: {name} is {_short(one)}, the manifest says {_short(other)}")
        if receipt.fingerprint != self._digest:
            said = f"of fingerprint {receipt.fingerprint[:16]}..., the manifest's is {self._digest[:16]}..."
            notes.add("fingerprint", f"{entry.receipt}: {said}")
        statistics = receipt.statistics
        columns = (statistics.sum, statistics.sum_squares, statistics.sum_variance)
        if any(len(column) != self._manifest.latent_channels or not all(map(isfinite, column)) for column in columns):
            notes.add(
                "receipts", f"{entry.receipt}: its statistics are not {self._manifest.latent_channels} finite sums"
            )
            return
        if self._takedown.touches(receipt):
            notes.add("removed", f"{entry.name}: it still holds samples that were taken down")
        looked.receipt = receipt

    def _read_through(self, entry: ShardEntry, looked: Looked) -> None:
        parent = self._store.url.rstrip("/")
        with open_stream(f"{parent}/{entry.name}", parts_ahead=2) as stream:
            if looked.receipt is not None:
                check = ShardCheck(self._texts, entry, looked.receipt, looked.notes)
                check.run(stream)
                looked.hashes, looked.numbers, looked.captions = check.hashes, check.numbers, check.captions
            else:
                while stream.read(_PIECE):
                    pass
                if stream.sha256() != entry.sha256:
                    looked.notes.add("checksums", f"{entry.name}: its SHA-256 is not the manifest's")
            looked.bytes = stream.bytes_read


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
