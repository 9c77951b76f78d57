"""Which samples each global batch holds, in closed form: a pure function of sizes, seed, batch, window and step.

World size, nodes, workers and restarts do not enter it. Legend: N samples of a stream, q its positions in a batch
(all B of the global batch, or its quota), w window.

A stream (one data set and picture size) is an infinite index: epoch e covers [e N, (e + 1) N), batch j covers
[j q, (j + 1) q). In an epoch the shards are permuted and the samples counted through them. The T batches that lie
wholly inside the epoch cut its samples into q equal runs of T; position p of each batch reads run p, permuted within
windows of w samples. A batch at a border takes the samples before the first run, or behind the last one, in order.
So each epoch holds each sample once, nothing is dropped, and each position goes through its shards in one direction.

Two details spare the storage. Windows begin at another step for each position (by the golden ratio, so that any
consecutive positions are spread evenly): reads come evenly too, not all at once. And odd runs are read back to front:
a block of samples that the border of two runs cuts is needed by both at the same time, and is read once.

Permutations are sorts by a hash of our own: numpy may change the streams of its generators between versions (NEP 19).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.splitmix import hash64
from pipeline.errors import ConfigError, DataError

Integers = NDArray[np.int64]

_EPOCHS_CACHED = 2
_SHARDS, _WINDOWS = 1, 2  # what a hash is for
_GOLDEN = 2_654_435_769  # 2**32 over the golden ratio
_LAST = np.uint64(2**64 - 1)
_MOST_OF_A_RANK = 2**20  # samples at once: plans alone would take gigabytes
AT_BORDER = -1
VERSION = 2
"""Of the order: equal inputs of another version give other batches."""


@dataclass(frozen=True)
class Group:
    """What one step takes: positions of one or several streams, all of the same picture size."""

    streams: tuple[int, ...]
    quotas: tuple[int, ...]  # positions of each in the batch; together the global batch
    weight: int  # share of the steps


@dataclass(frozen=True)
class Places:
    """What some positions of one global batch read; all arrays int64 [b]."""

    group: int
    stream: Integers
    epoch: Integers  # each position's epoch of its stream
    shard: Integers  # number of the shard in the stream's list
    sample: Integers  # number of the sample among the stream's in its shard, 0 to size - 1
    window: Integers  # number of the window that the position reads; `AT_BORDER` in a batch at an epoch's border


class Stream:
    """One data set and picture size.

    Args:
        sizes: samples of each shard; 0 is allowed.
        quota: samples that each of its batches takes.
        key: what the order depends on beside the sizes: seed and number of the stream.
        window: samples shuffled together within each run.

    Raises:
        DataError: the stream has no sample.
    """

    def __init__(self, sizes: Sequence[int] | Integers, quota: int, key: tuple[int, ...], window: int) -> None:
        self.sizes: Integers = np.asarray(sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if not self.samples:
            raise DataError("there is no sample to train on", "look at the manifest's rejects and its hold-out share")
        self.quota, self.window, self.key = quota, window, key
        self._epoch = lru_cache(_EPOCHS_CACHED)(self._plan_epoch)
        self._shuffled = _Shuffle(key)

    def at(self, number: int, positions: Integers) -> tuple[Integers, Integers, Integers, Integers]:
        """Epoch, shard, sample and window [b] that `positions` [b] of the stream's batch `number` read."""
        first = number * self.quota // self.samples
        if first == (number * self.quota + self.quota - 1) // self.samples:
            within, window = self._in_runs(first, number, positions)
            return np.full_like(positions, first), *self.locate(first, within), window
        index = number * self.quota + positions
        epoch = index // self.samples
        within = index - epoch * self.samples
        window = np.full_like(index, AT_BORDER)
        shard, sample = np.empty_like(index), np.empty_like(index)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            shard[here], sample[here] = self.locate(e, within[here])
        return epoch, shard, sample, window

    def locate(self, epoch: int, within: Integers) -> tuple[Integers, Integers]:
        """Shard and sample of places that are counted through an epoch."""
        order, starts = self._epoch(epoch)
        place = np.searchsorted(starts, within, "right") - 1
        return order[place], within - starts[place]

    def pieces(self, epoch: int, position: int, window: int) -> list[tuple[int, int, int]]:
        """What a position's window covers: shard, first sample and end in it, in the order of the run."""
        _, steps = self._inside(epoch)
        first, end = self._borders(np.array([position]), np.array([window]), steps)
        (low,), (high,) = self._in_epoch(epoch, np.array([position]), first, end)
        order, starts = self._epoch(epoch)
        place, found = int(np.searchsorted(starts, low, "right")) - 1, []
        while low < high:
            shard, begin = int(order[place]), int(low - starts[place])
            size = int(min(self.sizes[shard] - begin, high - low))
            found.append((shard, begin, begin + size))
            low, place = low + size, place + 1
        return found

    def windows(self, epoch: int, positions: Integers) -> list[tuple[Integers, Integers]]:
        """All windows of an epoch, by their number: first and end [b], counted through the epoch; may be empty."""
        _, steps = self._inside(epoch)
        numbers = range(1 + -(-max(steps, 0) // self.window))
        borders = [self._borders(positions, np.full_like(positions, v), steps) for v in numbers]
        return [self._in_epoch(epoch, positions, first, end) for first, end in borders]

    def _inside(self, epoch: int) -> tuple[int, int]:
        """The first batch that lies wholly inside an epoch, and how many do."""
        start = epoch * self.samples
        first = -(-start // self.quota)
        return first, (start + self.samples) // self.quota - first

    def _in_runs(self, epoch: int, number: int, positions: Integers) -> tuple[Integers, Integers]:
        """The samples, counted through the epoch, of a batch that lies wholly inside it; and their windows."""
        first, steps = self._inside(epoch)
        t = number - first
        phase = self._phase(positions)
        window = np.where(t < phase, 0, 1 + (t - phase) // self.window)
        begin, end = self._borders(positions, window, steps)
        place = begin + self._shuffled.at(epoch, positions, window, end - begin, t - begin)
        return self._in_epoch(epoch, positions, place, place + 1)[0], window

    def _phase(self, positions: Integers) -> Integers:
        """Samples of each position's window 0, which is shorter than the others."""
        return (positions * _GOLDEN % 2**32) * self.window >> 32

    def _borders(self, positions: Integers, window: Integers, steps: int) -> tuple[Integers, Integers]:
        """First step and end of windows, counted in the epoch's batches."""
        end = self._phase(positions) + window * self.window
        steps = max(steps, 0)
        return np.minimum(np.maximum(end - self.window, 0), steps), np.minimum(np.maximum(end, 0), steps)

    def _in_epoch(self, epoch: int, positions: Integers, first: Integers, end: Integers) -> tuple[Integers, Integers]:
        """Parts of the runs, as ranges counted through the epoch: odd runs go from their end to their beginning."""
        start, steps = self._inside(epoch)
        run = start * self.quota - epoch * self.samples + positions * steps
        back = positions % 2 == 1
        return run + np.where(back, steps - end, first), run + np.where(back, steps - first, end)

    def _plan_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """The epoch's non-empty shards in their order, and the number of samples before each."""
        shards = np.flatnonzero(self.sizes)
        order = shards[np.argsort(hash64(*self.key, _SHARDS, epoch, shards), kind="stable")]
        starts = np.concatenate([[0], np.cumsum(self.sizes[order])[:-1]])
        return order, starts


class _Shuffle:
    """Permutations of windows, of which those of the last call are kept: from step to step few are new."""

    def __init__(self, key: tuple[int, ...]) -> None:
        self._key = key
        self._epoch, self._positions = -1, np.empty(0, np.int64)
        self._window, self._order = np.empty(0, np.int64), np.empty((0, 0), np.int64)

    def at(self, epoch: int, positions: Integers, window: Integers, sizes: Integers, t: Integers) -> Integers:
        """What stands at place `t` [b] of the permutation of `sizes` [b] that each position has in its window."""
        if epoch != self._epoch or not np.array_equal(positions, self._positions):
            self._epoch, self._positions = epoch, positions.copy()
            self._window = np.full_like(positions, AT_BORDER)
            self._order = np.empty((len(positions), 0), np.int64)
        new = np.flatnonzero(window != self._window)
        if len(new):
            most = int(sizes[new].max())
            if most > self._order.shape[1]:
                self._order = np.pad(self._order, ((0, 0), (0, most - self._order.shape[1])))
            slots = np.arange(most)[None, :]
            keys = hash64(*self._key, _WINDOWS, epoch, positions[new, None], window[new, None], slots)
            keys[slots >= sizes[new, None]] = _LAST  # slots beyond a window's end come last: the sort is stable
            self._order[new, :most] = np.argsort(keys, axis=1, kind="stable")
            self._window[new] = window[new]
        return self._order[np.arange(len(positions)), t]


class Schedule:
    """Which of several groups each step takes, by weight: Sainte-Lague's sequence.

    The j-th step of a group with weight v, counted from 0, is due at (j + 1/2) / v; steps follow their dues, and the
    lowest number wins a tie. After `total` steps each group has had exactly its weight, and the schedule repeats.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        divisor = math.gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        self._period = sum(self._weights)
        self._jump(0)

    def at(self, step: int) -> tuple[int, int]:
        """The group that `step` takes, and the number of steps that took it before."""
        cycles, k = divmod(step, self._period)
        if not self._steps - 1 <= k <= self._steps + len(self._weights):
            self._jump(k)
        while self._steps <= k:
            self._advance()
        return self._last, cycles * self._weights[self._last] + self._taken[self._last] - 1

    def _jump(self, k: int) -> None:
        """To shortly before step k: all that is due before (k - groups) / period, which is less than k steps."""
        ahead, total = 2 * (k - len(self._weights)), self._period
        self._taken = [max(0, -((total - v * ahead) // (2 * total))) for v in self._weights]
        self._steps, self._last = sum(self._taken), -1

    def _advance(self) -> None:
        # due(a) < due(b) as whole numbers: (2 j_a + 1) v_b < (2 j_b + 1) v_a
        last = 0
        for group in range(1, len(self._weights)):
            mine = (2 * self._taken[group] + 1) * self._weights[last]
            if mine < (2 * self._taken[last] + 1) * self._weights[group]:
                last = group
        self._last = last
        self._taken[last] += 1
        self._steps += 1


class Order:
    """The order of a whole run: every step takes one global batch from one group of streams.

    Args:
        sizes: for each stream the samples of each of its shards.
        global_batch: samples per step over all ranks.
        seed: of the run.
        window: samples shuffled together within each run; memory grows with it.
        groups: of streams; by default each by itself, as often as it has samples, so that all epochs last as long.

    Raises:
        DataError: a stream has no sample.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int] | Integers],
        *,
        global_batch: int,
        seed: int,
        window: int,
        groups: Sequence[Group] | None = None,
    ) -> None:
        self.global_batch = global_batch
        if groups is None:
            groups = [Group((s,), (global_batch,), max(int(np.sum(n)), 1)) for s, n in enumerate(sizes)]
        quotas = {s: quota for group in groups for s, quota in zip(group.streams, group.quotas, strict=True)}
        if sorted(quotas) != list(range(len(sizes))) or any(sum(g.quotas) != global_batch for g in groups):
            raise ValueError("every stream belongs to one group, and a group's quotas make up the global batch")
        self.groups = tuple(groups)
        self.streams = [Stream(n, quotas[s], (seed, s), window) for s, n in enumerate(sizes)]
        self._schedule = Schedule([group.weight for group in groups])

    def batch(self, step: int, positions: Integers | None = None) -> Places:
        """What `positions` [b] of the global batch read at `step`; all positions by default."""
        if positions is None:
            positions = np.arange(self.global_batch, dtype=np.int64)
        positions = np.ascontiguousarray(positions, np.int64)
        number, batch = self._schedule.at(step)
        group = self.groups[number]
        stream, *found = (np.empty_like(positions) for _ in range(5))
        first = 0
        for s, quota in zip(group.streams, group.quotas, strict=True):
            here = (positions >= first) & (positions < first + quota)
            if here.any():
                stream[here] = s
                for array, values in zip(found, self.streams[s].at(batch, positions[here] - first), strict=True):
                    array[here] = values
            first += quota
        return Places(number, stream, *found)


def rank_positions(global_batch: int, rank: int, world_size: int) -> Integers:
    """The places in the global batch that belong to `rank`: int64 [global_batch / world_size], in order.

    Raises:
        ConfigError: the rank is not one of the world's; or its part is more than memory holds; or the world size does
            not divide the global batch, when the nearest that do are named.
    """
    if world_size < 1:
        raise ConfigError(f"world_size: {world_size} ranks read nothing", "start 1 rank or more")
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank: {rank} is none of {world_size} ranks", f"ranks count from 0: give one of 0 to {world_size - 1}"
        )
    if global_batch % world_size:
        small = [d for d in range(1, math.isqrt(global_batch) + 1) if global_batch % d == 0]
        divisors = [*small, *(global_batch // d for d in reversed(small))]
        below, above = max(d for d in divisors if d < world_size), [d for d in divisors if d > world_size][:1]
        nearest = " or ".join(str(d) for d in [below, *above])
        raise ConfigError(
            f"global_batch: {global_batch} samples cannot be shared equally by {world_size} ranks",
            f"start {nearest} ranks, or set global_batch to a multiple of {world_size}",
        )
    share = global_batch // world_size
    if share > _MOST_OF_A_RANK:
        raise ConfigError(
            f"global_batch: {global_batch} samples are {share} in each batch of {world_size} ranks, more than"
            f" {_MOST_OF_A_RANK}",
            "lower global_batch, or start more ranks",
        )
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
