"""Keys that occur more than once in a data set, and samples drawn from it by hash of key."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Bucket, Receipt

Place = tuple[int, int]  # number of the shard in the manifest, number of the sample in the shard
_ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplying by it mixes the seed into the high bits


class KeyIndex:
    """The 64-bit hashes of all keys: 8 bytes a sample, and as much again while they are sorted."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, hashes: array[int]) -> None:
        """Take in the next shard, its samples in file order."""
        self._hashes.append(np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64))

    def __len__(self) -> int:
        return sum(map(len, self._hashes))

    def repeated(self) -> Iterator[tuple[int, list[Place]]]:
        """Each hash that occurs more than once, with all of its places."""
        if not self._hashes:
            return
        together = np.concatenate(self._hashes)
        together.sort()
        twice = np.unique(together[1:][together[1:] == together[:-1]])
        del together
        if not len(twice):
            return
        places: dict[int, list[Place]] = {}
        for shard, hashes in enumerate(self._hashes):
            for sample in np.flatnonzero(np.isin(hashes, twice)):
                places.setdefault(int(hashes[sample]), []).append((shard, int(sample)))
        yield from sorted(places.items(), key=lambda item: item[1])


class Draw:
    """A few samples of each bucket, drawn by seed and hash of key: the same ones however the data are cut into shards.

    Args:
        count: samples in all.
        seed: another seed draws others.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, np.uint64(seed % 2**64)
        self._found: dict[Bucket, list[tuple[int, Place]]] = {}  # of each bucket the first by score

    def add(self, shard: int, receipt: Receipt) -> None:
        """Take in one shard."""
        hashes = np.frombuffer(receipt.hashes(), np.uint64)
        for part in receipt.buckets:
            first, end = part.train[0], part.holdout[1]
            scores = (hashes[first:end] ^ self._seed) * _ODD
            best = np.argsort(scores, kind="stable")[: self._count]
            found = self._found.setdefault(part.bucket, [])
            found += [(int(scores[i]), (shard, first + int(i))) for i in best]
            found.sort()
            del found[self._count :]

    def places(self) -> list[Place]:
        """The samples drawn, one of each bucket in turn."""
        turns = [
            (rank, bucket, place) for bucket, found in self._found.items() for rank, (_, place) in enumerate(found)
        ]
        return [place for _, _, place in sorted(turns)[: self._count]]
