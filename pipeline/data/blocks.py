"""Latent shards by blocks: the run of samples that one range request fetches and one checksum covers.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Block, Manifest, Split, load_receipt
from pipeline.data.samples import split_name
from pipeline.data.tar import members, read_npy
from pipeline.errors import DataError
from pipeline.storage import Store

_AGAIN = "delete this shard and its receipt, and run `lathe encode` again"
_TOKENS = re.compile(r"tokens(\d+)\.clip\.npy")


@dataclass(frozen=True)
class LatentSample:
    """One encoded picture; the arrays are read-only views of its block. A mirrored latent is passed over."""

    key: str
    moments: NDArray[np.float16]  # [2C, h, w]: the posterior's mean and log-variance
    tokens: tuple[NDArray[np.uint16], ...]  # of each caption, [L]
    json: memoryview

    def captions(self) -> list[str]:
        """The captions as text, in the order of `tokens`."""
        return [str(caption) for caption in json.loads(bytes(self.json))["captions"]]


@dataclass(frozen=True)
class ShardPlan:
    """The blocks of one shard that hold a split, and the number of samples of the split before each."""

    blocks: tuple[Block, ...]
    starts: NDArray[np.int64]

    def locate(self, sample: int) -> tuple[int, int]:
        """The block that holds a sample of the split, and its place in the block."""
        block = int(np.searchsorted(self.starts, sample, "right")) - 1
        return block, sample - int(self.starts[block])


class BlockReader:
    """Reads plans and blocks of one split; safe in threads, it holds no state of its own.

    Args:
        store: the manifest's folder.
        manifest: what it should hold.
        split: which samples.

    Raises:
        DataError: the latents are of several shapes, or their captions are no token ids for a tower in training.
    """

    def __init__(self, store: Store, manifest: Manifest, split: Split) -> None:
        self._store, self._manifest, self._split = store, manifest, split
        if (mode := manifest.fingerprint.text_mode) != "joint":
            raise DataError(
                f"the latents' captions are stored for text.mode={mode}, and this command takes joint only",
                "encode them with text.mode=joint, to another output",
            )
        side = manifest.latent_side
        self._shape = (2 * manifest.latent_channels, side, side)

    def plan(self, shard: int) -> ShardPlan:
        """The blocks of a shard, from its receipt.

        Raises:
            DataError: the receipt is damaged, or of another encoding than the manifest.
            StorageError: it cannot be read.
        """
        entry = self._manifest.shards[shard]
        receipt = load_receipt(self._store, entry.receipt)
        ranges = receipt.ranges(self._split)
        inside = [b for b in receipt.blocks if any(first <= b.first_sample < end for first, end in ranges)]
        counts = [block.samples for block in inside]
        if receipt.sha256 != entry.sha256 or sum(counts) != entry.samples(self._split):
            raise DataError(
                f"{self._place(shard)}: its receipt is not the one the manifest was made from",
                "run `lathe encode` again, which makes the manifest anew",
            )
        return ShardPlan(tuple(inside), np.cumsum([0, *counts[:-1]], dtype=np.int64))

    def block(self, shard: int, block: Block) -> list[LatentSample]:
        """The samples of one block, checked against its checksum.

        Raises:
            DataError: bytes are missing or changed, or a member is not what the manifest says.
            StorageError: it cannot be read.
        """
        where = (
            f"{self._place(shard)}: samples {block.first_sample} to {block.first_sample + block.samples - 1}"
            f" (bytes {block.offset} to {block.offset + block.length - 1})"
        )
        data = self._store.read(self._manifest.shards[shard].name, block.offset, block.offset + block.length)
        if len(data) != block.length:
            raise DataError(f"{where}: the shard ends after {len(data)} of these {block.length} bytes", _AGAIN)
        if zlib.crc32(data) != block.crc32:
            raise DataError(f"{where} are damaged: the checksum is not the receipt's", _AGAIN)
        try:
            samples = [self._sample(key, parts) for key, parts in _grouped(memoryview(data)).items()]
        except DataError as error:
            raise DataError(f"{where}: {error.message}", _AGAIN) from error
        if len(samples) != block.samples:
            raise DataError(f"{where}: {len(samples)} samples in place of {block.samples}", _AGAIN)
        return samples

    def _sample(self, key: str, parts: dict[str, memoryview]) -> LatentSample:
        texts = sorted((int(found[1]), name) for name in parts if (found := _TOKENS.fullmatch(name)))
        if "latent.npy" not in parts or "json" not in parts or not texts:
            raise DataError(f"sample {key!r} is not whole: it has only {', '.join(sorted(parts))}")
        moments = _checked(key, read_npy(parts["latent.npy"]), np.float16, self._shape)
        length = (self._manifest.context_length,)
        tokens = tuple(_checked(key, read_npy(parts[name]), np.uint16, length) for _, name in texts)
        return LatentSample(key, moments, tokens, parts["json"])

    def _place(self, shard: int) -> str:
        return f"{self._store.url.rstrip('/')}/{self._manifest.shards[shard].name}"


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass
class LruCache(Generic[_Key, _Value]):
    """Keeps the most recently used values, up to a total weight; for one thread at a time."""

    capacity: int
    weigh: Callable[[_Value], int]
    weight: int = 0
    _kept: OrderedDict[_Key, _Value] = field(default_factory=OrderedDict)

    def get(self, keys: Iterable[_Key], fetch: Callable[[_Key], _Value], pool: Executor) -> dict[_Key, _Value]:
        """The values of all keys; those not kept are fetched at the same time. Raises what `fetch` raises."""
        keys = list(dict.fromkeys(keys))
        missing = [key for key in keys if key not in self._kept]
        for key, value in zip(missing, pool.map(fetch, missing), strict=True):
            self._kept[key] = value
            self.weight += self.weigh(value)
        for key in keys:
            self._kept.move_to_end(key)
        return {key: self._kept[key] for key in keys}

    def trim(self) -> None:
        """Drop what was used longest ago, down to the capacity."""
        while self.weight > self.capacity:
            self.weight -= self.weigh(self._kept.popitem(last=False)[1])


def _grouped(data: memoryview) -> dict[str, dict[str, memoryview]]:
    """Members by key and extension."""
    found: dict[str, dict[str, memoryview]] = {}
    for name, offset, size in members(data):
        key, extension = split_name(name)
        found.setdefault(key, {})[extension] = data[offset : offset + size]
    return found


def _checked(key: str, array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    if array.dtype != dtype or array.shape != shape:
        raise DataError(
            f"sample {key!r} holds {array.dtype} {list(array.shape)} where the manifest says"
            f" {np.dtype(dtype).name} {list(shape)}"
        )
    return array
