"""Which blocks each step of a rank needs, asked for ahead of time, and held no longer than their windows.

A position reads all samples of its window before it enters the next one. So it holds the window's blocks, and lets them
go together. Nobody counts: a block lives as long as a window, a step that is not assembled yet, or both refer to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockReference, BlockSource
from pipeline.data.order import AT_BORDER, Integers, Order, Places
from pipeline.data.shard_plan import ShardPlan

REQUEST_BYTES = 4 << 20
"""What one request asks for at most, unless a single block is longer."""
HURRIED_STEPS = 8
"""Steps of a start, and of each stream's epoch, that ask for no more than they need, see `Planner`."""

_Id = tuple[int, int, int]  # stream, shard, block of its plan


@dataclass(frozen=True)
class PlannedStep:
    """What one step reads: for each of the rank's positions a block and a row in it; None = skipped."""

    step: int
    places: Places
    rows: list[tuple[BlockReference, int] | None]


class _Read(NamedTuple):
    """What one position reads in a step."""

    position: int
    stream: int
    epoch: int
    window: int
    shard: int
    sample: int


@dataclass
class _Window:
    """What a position holds of the window it is in."""

    name: tuple[int, int]  # epoch, number
    wanted: set[_Id] = field(default_factory=set)
    held: dict[_Id, BlockReference] = field(default_factory=dict)


class Planner:
    """Plans a rank's steps, one after another; for one thread at a time.

    Args:
        datasets: what is read.
        order: of the run.
        source: where blocks come from.
        positions: the rank's, int64 [b].
        origin: the step with which the order begins.
        plans_kept: of how many shards of a subset is kept which samples take part.
        hurried: steps of each stream, at a start and at an epoch's border, that ask for no more than they need: there
            all positions enter windows at once.
    """

    def __init__(
        self,
        datasets: DataSets,
        order: Order,
        source: BlockSource,
        positions: Integers,
        *,
        origin: int,
        plans_kept: int,
        hurried: int,
    ) -> None:
        self._hurried, self._hurry = hurried, [0] * len(order.streams)
        self._selected = lru_cache(plans_kept)(self._find_selected)
        self._origin = origin
        self._datasets, self._order, self._source, self._positions = datasets, order, source, positions
        self._first = {  # of each stream, its first position in the batch
            stream: sum(group.quotas[:i]) for group in order.groups for i, stream in enumerate(group.streams)
        }
        self._windows: dict[tuple[int, int], _Window] = {}  # by stream and position
        self._alive: WeakValueDictionary[_Id, BlockReference] = WeakValueDictionary()

    @property
    def blocks_held(self) -> int:
        """Blocks in memory or under way, see `BlockReference`."""
        return len(self._alive)

    def plan(self, step: int) -> PlannedStep:
        """The blocks of any step; those that are not at hand are asked for. Neighbouring steps are cheap.

        Raises:
            DataError, StorageError: a receipt cannot be used.
        """
        places = self._order.batch(step - self._origin, self._positions)
        columns = (self._positions, places.stream, places.epoch, places.window, places.shard, places.sample)
        reads = [_Read(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        entering = [read for read in reads if self._enters(read)]
        self._count_hurry(reads, entering)
        pieces = {(read.stream, read.position): self._pieces(read) for read in entering}
        shards = {(read.stream, read.shard) for read in reads}
        shards |= {(stream, shard) for (stream, _), found in pieces.items() for shard, _, _ in found}
        plans = self._source.plans(shards)
        for read in entering:
            place = read.stream, read.position
            self._windows[place] = self._enter(read, pieces[place], plans)
        return PlannedStep(step, places, [self._row(read, plans[read.stream, read.shard]) for read in reads])

    def _enters(self, read: _Read) -> bool:
        known = self._windows.get((read.stream, read.position))
        return known is None or known.name != (read.epoch, read.window)

    def _count_hurry(self, reads: Sequence[_Read], entering: Sequence[_Read]) -> None:
        """Streams begin to hurry where a position leaves a border or an epoch, as then all do."""
        begun = set()
        for read in entering:
            known = self._windows.get((read.stream, read.position))
            if known is None or known.name[1] == AT_BORDER or known.name[0] != read.epoch:
                begun.add(read.stream)
        for stream in {read.stream for read in reads}:
            self._hurry[stream] = self._hurried if stream in begun else max(0, self._hurry[stream] - 1)

    def _pieces(self, read: _Read) -> list[tuple[int, int, int]]:
        if read.window == AT_BORDER:
            return []
        stream = self._order.streams[read.stream]
        return stream.pieces(read.epoch, read.position - self._first[read.stream], read.window)

    def _enter(
        self, read: _Read, pieces: Iterable[tuple[int, int, int]], plans: Mapping[tuple[int, int], ShardPlan | None]
    ) -> _Window:
        """A window, with those of its blocks that are at hand."""
        window, stream = _Window((read.epoch, read.window)), read.stream
        for shard, first, end in pieces:
            if (plan := plans[stream, shard]) is not None:
                window.wanted.update((stream, shard, block) for block in self._blocks(stream, shard, plan, first, end))
        for place in window.wanted:
            if (found := self._alive.get(place)) is not None:
                window.held[place] = found
        return window

    def _blocks(self, stream: int, shard: int, plan: ShardPlan, first: int, end: int) -> Iterable[int]:
        """The blocks with a stream's samples [first, end) of a shard."""
        selected = self._selected(stream, shard)
        if selected is None:
            return range(plan.locate(first)[0], plan.locate(end - 1)[0] + 1)
        blocks: list[int] = np.unique(np.searchsorted(plan.starts, selected[first:end], "right") - 1).tolist()
        return blocks

    def _row(self, read: _Read, plan: ShardPlan | None) -> tuple[BlockReference, int] | None:
        if plan is None:
            return None
        position, stream, _, _, shard, sample = read
        if (selected := self._selected(stream, shard)) is not None:
            sample = int(selected[sample])
        block, row = plan.locate(sample)
        held, place = self._windows[stream, position].held, (stream, shard, block)
        if (reference := held.get(place)) is None:
            reference = self._alive.get(place)
            if reference is None:
                self._ask(self._windows[stream, position], stream, shard, plan, block)
                return held[place], row
            held[place] = reference
        return reference, row

    def _ask(self, window: _Window, stream: int, shard: int, plan: ShardPlan, block: int) -> None:
        """Ask for a block, together with its neighbours that the window wants and that are not at hand."""

        def joins(new: int, first: int, last: int) -> bool:
            place = (stream, shard, new)
            if self._hurry[stream] or place not in window.wanted or place in self._alive:
                return False
            size = int(plan.offset[last] + plan.length[last] - plan.offset[first])
            # only what touches in the file
            return size == int(plan.length[first : last + 1].sum()) and size <= REQUEST_BYTES

        first = last = block
        while joins(last + 1, first, last + 1):
            last += 1
        while joins(first - 1, first - 1, last):
            first -= 1
        blocks = range(first, last + 1)
        for i, reference in zip(blocks, self._source.read(stream, shard, plan, blocks), strict=True):
            window.held[stream, shard, i] = self._alive[stream, shard, i] = reference

    def _find_selected(self, stream: int, shard: int) -> Integers | None:
        info = self._datasets.streams[stream]
        return self._datasets.selected(info.dataset, shard, info.bucket)
