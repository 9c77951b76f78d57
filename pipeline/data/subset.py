"""Training on a part of a data set without encoding anew: a share chosen by hash of key, a list of keys, or both.

Receipts know keys by 64-bit hashes (`key_hash`), which is what a share is measured on and a list is looked up by. The
hold-out is chosen by another hash, so it says nothing of the share. All receipts are read once, at start; what is kept
is a bit for each sample, or 4 bytes for each chosen one, whichever is less.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pipeline.data.manifest import (
    FORMAT_VERSION,
    Bucket,
    BucketRange,
    Manifest,
    ShardEntry,
    key_hash,
    load_receipt,
)
from pipeline.data.order import Integers
from pipeline.data.shard_plan import wrong_receipt
from pipeline.errors import DataError
from pipeline.storage import Store, read_file

Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]

_REQUESTS_AT_ONCE = 16
_QUEUED = 1024  # receipts; a future for each of 100,000 would take more memory than what is kept
_KEY_SHOWN = 100  # characters
_EMPTY = np.empty(0, np.int32)


@dataclass(frozen=True)
class KeyList:
    """A file of keys, as hashes without repetition, ascending."""

    url: str
    hashes: Hashes  # [n]
    places: Integers  # [n], where among the file's keys each stands first
    data: bytes  # the file, for messages: a hash does not tell its key

    def digest(self) -> str:
        """SHA-256 of the set of keys, hexadecimal: neither order nor repeated lines change it."""
        return hashlib.sha256(self.hashes.astype(">u8").tobytes()).hexdigest()

    def some(self, of: Mask) -> str:
        """How many these are, a mask [n], and which of them stands first in the file."""
        first = next(itertools.islice(_keys(self.data), int(self.places[of].min()), None))
        shown = repr(first if first is None or len(first) <= _KEY_SHOWN else f"{first[:_KEY_SHOWN]}...")
        return f"{of.sum()} of its {len(of)} keys, the first is {shown}"


def read_keys(url: str) -> KeyList:
    """A list of keys, one a line; empty lines are passed over.

    Args:
        url: the file's address, local or s3://.

    Raises:
        DataError: no key in it, or not UTF-8.
        StorageError: it cannot be read.
    """
    data = read_file(url)
    try:
        hashes, places = np.unique(np.fromiter(map(key_hash, _keys(data)), np.uint64), return_index=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{url} is not UTF-8", "save it as UTF-8, one key a line") from error
    if not len(hashes):
        raise DataError(f"{url} lists no key", "write one key a line, or leave out keys to train on all samples")
    return KeyList(url, hashes, places, data)


def _keys(data: bytes) -> Iterator[str]:
    for line in io.BytesIO(data.removeprefix(codecs.BOM_UTF8)):
        if key := line.strip(b"\r\n").decode("utf-8"):
            yield key


@dataclass(frozen=True)
class Selection:
    """The training samples of a data set that take part."""

    sizes: dict[Bucket, Integers]  # how many of them each shard has: [shards]
    kept: list[NDArray[Any]]  # of each shard's training samples: bits as uint8, or ascending numbers as int32

    def numbers(self, shard: int, entry: ShardEntry, bucket: Bucket) -> Integers:
        """Those of one shard and bucket, ascending, counted through the bucket's training range."""
        kept = self.kept[shard]
        chosen = np.flatnonzero(np.unpackbits(kept)) if kept.dtype == np.uint8 else kept.astype(np.int64)
        place = [here.bucket for here in entry.buckets].index(bucket)
        first = sum(here.train for here in entry.buckets[:place])
        start, end = np.searchsorted(chosen, (first, first + entry.buckets[place].train))
        return chosen[start:end] - first


def select(
    store: Store, manifest: Manifest, share: float, keys: KeyList | None, progress: Callable[[], None]
) -> Selection:
    """Which training samples take part, by the receipts of all shards.

    Args:
        store: the manifest's folder.
        manifest: of the data set.
        share: a sample takes part where the hash of its key is below it, as a part of 2^64; 1 = all.
        keys: and where it is listed here; None = all.
        progress: called in this thread for each receipt that was read.

    Raises:
        DataError: a receipt is damaged, or not the manifest's; a listed key is unknown, or held out.
        StorageError: a receipt cannot be read.
    """
    reader = _Reader(store, manifest, share, keys)
    sizes = {bucket: np.zeros(len(manifest.shards), np.int64) for bucket in manifest.buckets("train")}
    kept: list[NDArray[Any]] = [_EMPTY] * len(manifest.shards)
    todo = shards_to_read(manifest)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE, "receipts") as pool:
        for start in range(0, len(todo), _QUEUED):
            part = todo[start : start + _QUEUED]
            for shard, (chosen, counts) in zip(part, pool.map(reader.read, part), strict=True):
                kept[shard] = chosen
                for here, count in zip(manifest.shards[shard].buckets, counts, strict=True):
                    if count:
                        sizes[here.bucket][shard] = count
                progress()
    reader.check_keys()
    return Selection(sizes, kept)


def shards_to_read(manifest: Manifest) -> list[int]:
    """Numbers of the shards that hold samples of either split: a listed key may be a held-out one."""
    return [n for n, entry in enumerate(manifest.shards) if entry.samples("train") or entry.samples("holdout")]


class _Keys(BaseModel):
    """What is used of a receipt; validating the whole takes five times as long."""

    model_config = ConfigDict(val_json_bytes="base64")

    format_version: int
    sha256: str
    buckets: tuple[BucketRange, ...]
    keys: bytes

    @field_validator("format_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != FORMAT_VERSION:
            raise ValueError("another format")
        return version

    def fits(self, entry: ShardEntry) -> bool:
        """Whether this is the receipt that the manifest's entry was made from."""
        counts = [(b.bucket, b.train[1] - b.train[0], b.holdout[1] - b.holdout[0]) for b in self.buckets]
        same = counts == [(b.bucket, b.train, b.holdout) for b in entry.buckets]
        end = max((end for b in self.buckets for _, end in (b.train, b.holdout)), default=0)
        return same and self.sha256 == entry.sha256 and 8 * end == len(self.keys)

    def hashes(self) -> Hashes:
        """`key_hash` of every sample, in file order."""
        return np.frombuffer(self.keys, ">u8").astype(np.uint64)


class _Reader:
    """Receipts to selections, from several threads; remembers which keys of the list it came across."""

    def __init__(self, store: Store, manifest: Manifest, share: float, keys: KeyList | None) -> None:
        self._store, self._manifest, self._share, self._keys = store, manifest, share, keys
        listed = 0 if keys is None else len(keys.hashes)
        self._trained, self._held_out = np.zeros(listed, np.bool_), np.zeros(listed, np.bool_)

    def read(self, shard: int) -> tuple[NDArray[Any], list[int]]:
        """What is kept of one shard, and how many samples of each of its buckets."""
        receipt = self._receipt(self._manifest.shards[shard])
        hashes, masks = receipt.hashes(), []
        for part in receipt.buckets:
            training = hashes[slice(*part.train)]
            masks.append(self._listed(training, self._trained) & self._in_share(training))
            self._listed(hashes[slice(*part.holdout)], self._held_out)
        return _packed(np.concatenate(masks)), [int(np.count_nonzero(mask)) for mask in masks]

    def check_keys(self) -> None:
        """Raises DataError where a listed key was in no receipt, or is held out."""
        if self._keys is None:
            return
        unknown = ~(self._trained | self._held_out)
        if unknown.any():
            raise DataError(
                f"{self._keys.url} lists samples that {self._store.url} does not hold: {self._keys.some(unknown)}",
                "take them out of the list; they belong to another manifest, were rejected or were removed",
            )
        if self._held_out.any():
            raise DataError(
                f"{self._keys.url} lists samples that are held out of training: {self._keys.some(self._held_out)}",
                "take them out of the list: training on them would spoil validation",
            )

    def _receipt(self, entry: ShardEntry) -> _Keys:
        try:
            receipt = _Keys.model_validate_json(self._store.read(entry.receipt))
        except ValidationError:
            receipt = None
            load_receipt(self._store, entry.receipt)  # says what is wrong
        if receipt is None or not receipt.fits(entry):
            raise wrong_receipt(self._store, entry)
        return receipt

    def _in_share(self, hashes: Hashes) -> Mask:
        if self._share == 1:
            return np.ones(len(hashes), np.bool_)
        return hashes < np.uint64(int(self._share * 2**64))

    def _listed(self, hashes: Hashes, seen: Mask) -> Mask:
        """Which of these are in the list, if there is one; notes them in `seen`."""
        if self._keys is None:
            return np.ones(len(hashes), np.bool_)
        places = np.searchsorted(self._keys.hashes, hashes) % len(self._keys.hashes)
        found: Mask = self._keys.hashes[places] == hashes
        seen[places[found]] = True
        return found


def _packed(mask: Mask) -> NDArray[Any]:
    bits, numbers = np.packbits(mask), np.flatnonzero(mask).astype(np.int32)
    return bits if bits.nbytes <= numbers.nbytes else numbers
