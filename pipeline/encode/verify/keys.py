"""Keys that occur more than once in a data set, and samples drawn from it by hash of key."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Bucket, Receipt

Place = tuple[int, int]  # number of the shard in the manifest, number of the sample in the shard
_NAMED, _PLACES = 20, 4  # hashes that occur more than once, places of each; more are counted only
_ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplying by it mixes the seed into the high bits


@dataclass(frozen=True)
class Repeated:
    """A hash that occurs more than once."""

    hash: int
    count: int
    places: tuple[Place, ...]  # the first of them


class KeyIndex:
    """The 64-bit hashes of all keys: 8 bytes a sample, and as much again while they are sorted."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, hashes: array[int]) -> None:
        """Take in the next shard, its samples in file order."""
        self._hashes.append(np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64))

    def __len__(self) -> int:
        return sum(map(len, self._hashes))

    def repeated(self) -> tuple[list[Repeated], int]:
        """The first hashes that occur more than once, in order of place, and how many there are in all."""
        if not self._hashes:
            return [], 0
        together = np.concatenate(self._hashes)
        together.sort()
        twice = np.unique(together[1:][together[1:] == together[:-1]])
        found = self._places(twice)
        hashes = np.array(list(found), np.uint64)
        counts = np.searchsorted(together, hashes, "right") - np.searchsorted(together, hashes)
        named = zip(found.items(), counts.tolist(), strict=True)
        return [Repeated(hashed, count, tuple(places)) for (hashed, places), count in named], len(twice)

    def _places(self, twice: NDArray[np.uint64]) -> dict[int, list[Place]]:
        found: dict[int, list[Place]] = {}
        for shard, hashes in enumerate(self._hashes):
            if len(found) == _NAMED:
                twice = np.array([hashed for hashed, places in found.items() if len(places) < _PLACES], np.uint64)
            if not len(twice):
                break
            for sample in np.flatnonzero(np.isin(hashes, twice)):
                hashed = int(hashes[sample])
                if hashed in found or len(found) < _NAMED:
                    places = found.setdefault(hashed, [])
                    if len(places) < _PLACES:
                        places.append((shard, int(sample)))
        return found


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
