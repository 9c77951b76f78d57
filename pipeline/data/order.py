"""Which samples each global batch holds, in closed form: a pure function of sizes, seed, batch, window and step.

World size, nodes, workers and restarts do not enter it. Legend: N samples of a stream, B global batch, w window.

A stream (one data set and picture size) is an infinite index: epoch e covers [e N, (e + 1) N), batch j covers
[j B, (j + 1) B). In an epoch the shards are permuted and the samples counted through them. The T batches that lie
wholly inside the epoch cut its samples into B equal runs of T; position p of each batch reads run p, permuted within
windows of w samples. A batch at a border takes the samples before the first run, or behind the last one, in order.
So each epoch holds each sample once, nothing is dropped, and each position reads its shards from front to back.

Permutations are sorts by a hash of our own: numpy may change the streams of its generators between versions (NEP 19).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError

Integers = NDArray[np.int64]

_EPOCHS_CACHED = 4
_SHARDS, _WINDOWS = 1, 2  # what a hash is for


@dataclass(frozen=True)
class Places:
    """What some positions of one global batch read; all arrays int64 [b]."""

    stream: int
    first_epoch: int  # the stream's epoch in which the global batch begins
    epoch: Integers  # each position's epoch of the stream
    shard: Integers  # number of the shard in the stream's list
    sample: Integers  # number of the sample in its shard, 0 to size - 1


class Stream:
    """One data set and picture size.

    Args:
        sizes: samples of each shard; 0 is allowed.
        global_batch: samples per step over all ranks.
        key: what the order depends on beside the sizes: seed and number of the stream.
        window: samples shuffled together within each run.

    Raises:
        DataError: the stream has no sample.
    """

    def __init__(self, sizes: Sequence[int], global_batch: int, key: tuple[int, ...], window: int) -> None:
        self.sizes: Integers = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if not self.samples:
            raise DataError("there is no sample to train on", "look at the manifest's rejects and its hold-out share")
        self.global_batch, self.window, self.key = global_batch, window, key
        self._epoch = lru_cache(_EPOCHS_CACHED)(self._plan_epoch)
        self._window = lru_cache(1)(self._plan_window)

    @property
    def span(self) -> int:
        """Most samples that one position's window holds."""
        return min(self.window, self.samples // self.global_batch)

    def at(self, number: int, positions: Integers) -> tuple[Integers, Integers, Integers]:
        """Epoch, shard and sample [b] that `positions` [b] of the stream's batch `number` read."""
        index = number * self.global_batch + positions
        epoch = index // self.samples
        within = index - epoch * self.samples
        first = number * self.global_batch // self.samples
        if first == (number * self.global_batch + self.global_batch - 1) // self.samples:
            within = self._in_runs(first, number, positions)
        shard, sample = np.empty_like(index), np.empty_like(index)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            order, starts = self._epoch(e)
            place = np.searchsorted(starts, within[here], "right") - 1
            shard[here], sample[here] = order[place], within[here] - starts[place]
        return epoch, shard, sample

    def _in_runs(self, epoch: int, number: int, positions: Integers) -> Integers:
        """The samples, counted through the epoch, of a batch that lies wholly inside it."""
        start = epoch * self.samples
        first = -(-start // self.global_batch)
        steps = (start + self.samples) // self.global_batch - first
        window, t = divmod(number - first, self.window)
        size = min(self.window, steps - window * self.window)
        shuffled = self._window(epoch, window, size, positions.tobytes())
        head = first * self.global_batch - start
        return head + positions * steps + window * self.window + shuffled[:, t]

    def _plan_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """The epoch's non-empty shards in their order, and the number of samples before each."""
        shards = np.flatnonzero(self.sizes)
        order = shards[np.argsort(_hash(*self.key, _SHARDS, epoch, shards), kind="stable")]
        starts = np.concatenate([[0], np.cumsum(self.sizes[order])[:-1]])
        return order, starts

    def _plan_window(self, epoch: int, window: int, size: int, positions: bytes) -> Integers:
        """A permutation of `size` for each of b positions: [b, size]."""
        rows = np.frombuffer(positions, np.int64)[:, None]
        keys = _hash(*self.key, _WINDOWS, epoch, window, rows, np.arange(size)[None, :])
        return np.argsort(keys, axis=1, kind="stable")


class Schedule:
    """Which stream each step takes: the one that lags most behind its share of the steps.

    Step k takes the stream with the largest weight * (k + 1) - total * taken; the lowest number wins a tie. In exact
    integers a stream is never a whole batch ahead of its share, so after `total` steps each has had exactly its
    weight, and the schedule repeats.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._period = sum(self._weights)
        self._restart()

    def at(self, step: int) -> tuple[int, int]:
        """The stream that `step` takes, and the number of steps that took it before."""
        cycles, k = divmod(step, self._period)
        if k < self._steps - 1:
            self._restart()
        while self._steps <= k:
            self._advance()
        return self._last, cycles * self._weights[self._last] + self._taken[self._last] - 1

    def _restart(self) -> None:
        self._steps, self._last, self._taken = 0, 0, [0] * len(self._weights)

    def _advance(self) -> None:
        self._steps += 1
        lags = [w * self._steps - self._period * c for w, c in zip(self._weights, self._taken, strict=True)]
        self._last = lags.index(max(lags))
        self._taken[self._last] += 1


class Order:
    """The order of a whole run: every step takes one global batch from one stream.

    Args:
        sizes: for each stream the samples of each of its shards.
        global_batch: samples per step over all ranks.
        seed: of the run.
        window: samples shuffled together within each run; memory grows with it.
        weights: each stream's share of the steps; by default its number of samples, so that all epochs last as long.

    Raises:
        DataError: a stream has no sample.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        *,
        global_batch: int,
        seed: int,
        window: int,
        weights: Sequence[int] | None = None,
    ) -> None:
        self.global_batch = global_batch
        self.streams = [Stream(s, global_batch, (seed, number), window) for number, s in enumerate(sizes)]
        self._schedule = Schedule(weights or [stream.samples for stream in self.streams])

    def batch(self, step: int, positions: Integers | None = None) -> Places:
        """What `positions` [b] of the global batch read at `step`; all positions by default."""
        everyone = np.arange(self.global_batch, dtype=np.int64)
        positions = everyone if positions is None else np.ascontiguousarray(positions, np.int64)
        number, batch = self._schedule.at(step)
        stream = self.streams[number]
        epoch, shard, sample = stream.at(batch, positions)
        return Places(number, batch * self.global_batch // stream.samples, epoch, shard, sample)


def rank_positions(global_batch: int, rank: int, world_size: int) -> Integers:
    """The places in the global batch that belong to `rank`: int64 [global_batch / world_size], in order.

    Raises:
        ConfigError: the world size does not divide the global batch; names the nearest that do.
    """
    if global_batch % world_size:
        divisors = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
        below, above = max(d for d in divisors if d < world_size), [d for d in divisors if d > world_size][:1]
        nearest = " or ".join(str(d) for d in [below, *above])
        raise ConfigError(
            f"global_batch: {global_batch} samples cannot be shared equally by {world_size} ranks",
            f"start {nearest} ranks, or set global_batch to a multiple of {world_size}",
        )
    share = global_batch // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


def _hash(*parts: int | Integers) -> NDArray[np.uint64]:
    """64 bits for each element of the broadcast parts: a chain of splitmix64 (Steele et al. 2014, fig. 14)."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = np.atleast_1d(np.asarray(part % 2**64 if isinstance(part, int) else part).astype(np.uint64))
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
