"""Which blocks each step of a rank needs, asked for ahead of time, and held no longer than their windows.

A position reads all samples of its window before it enters the next one. So it holds the window's blocks, and lets them
go together. Nobody counts: a block lives as long as a window, a step that is not assembled yet, or both refer to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np

from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockSource, Pending
from pipeline.data.latent_block import LatentBlock
from pipeline.data.order import AT_BORDER, Integers, Order, Places
from pipeline.data.shard_plan import ShardPlan

REQUEST_BYTES = 4 << 20
"""What one request asks for at most, unless a single block is longer."""

_Id = tuple[int, int, int]  # stream, shard, block of its plan


class BlockReference:
    """One block of a request; as long as somebody refers to it, others find it and need not read it again."""

    __slots__ = ("__weakref__", "_index", "_read")

    def __init__(self, read: Pending[list[LatentBlock | None]], index: int) -> None:
        self._read, self._index = read, index

    def get(self) -> LatentBlock | None:
        """The block, waited for; None where it is skipped. Raises what reading it raised."""
        return self._read.result()[self._index]


@dataclass(frozen=True)
class PlannedStep:
    """What one step reads: for each of the rank's positions a block and a row in it; None = skipped."""

    step: int
    places: Places
    rows: list[tuple[BlockReference, int] | None]


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
    """

    def __init__(
        self, datasets: DataSets, order: Order, source: BlockSource, positions: Integers, origin: int = 0
    ) -> None:
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

    def plan(self, step: int, *, hurry: bool) -> PlannedStep:
        """The step's blocks; those that are not at hand are asked for.

        Args:
            step: whichever; neighbours are cheap.
            hurry: ask for no more than this step needs, as somebody waits for it.

        Raises:
            DataError, StorageError: a receipt cannot be used.
        """
        places = self._order.batch(step - self._origin, self._positions)
        columns = (places.stream, places.epoch, places.window, places.shard, places.sample)
        where = list(zip(self._positions.tolist(), *(column.tolist() for column in columns), strict=True))
        entered = {}
        for position, stream, epoch, number, _, _ in where:
            known = self._windows.get((stream, position))
            if known is None or known.name != (epoch, number):
                entered[stream, position] = self._pieces(stream, position, epoch, number)
        shards = {(stream, shard) for _, stream, _, _, shard, _ in where}
        shards |= {(stream, shard) for (stream, _), found in entered.items() for shard, _, _ in found}
        plans = self._source.plans(shards)
        rows = []
        for position, stream, epoch, number, shard, sample in where:
            if (stream, position) in entered:
                window = self._enter(stream, (epoch, number), entered[stream, position], plans)
                self._windows[stream, position] = window
            window = self._windows[stream, position]
            rows.append(self._row(window, stream, shard, sample, plans[stream, shard], hurry=hurry))
        return PlannedStep(step, places, rows)

    def _pieces(self, stream: int, position: int, epoch: int, window: int) -> list[tuple[int, int, int]]:
        if window == AT_BORDER:
            return []
        return self._order.streams[stream].pieces(epoch, position - self._first[stream], window)

    def _enter(
        self,
        stream: int,
        name: tuple[int, int],
        pieces: Iterable[tuple[int, int, int]],
        plans: dict[tuple[int, int], ShardPlan | None],
    ) -> _Window:
        """A window, with those of its blocks that are at hand."""
        window = _Window(name)
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

    def _row(
        self, window: _Window, stream: int, shard: int, sample: int, plan: ShardPlan | None, *, hurry: bool
    ) -> tuple[BlockReference, int] | None:
        if plan is None:
            return None
        selected = self._selected(stream, shard)
        block, row = plan.locate(sample if selected is None else int(selected[sample]))
        place = (stream, shard, block)
        found = window.held.get(place) or self._alive.get(place)
        if found is None:
            self._ask(window, stream, shard, plan, block, hurry=hurry)
            found = window.held[place]
        window.held[place] = found
        return found, row

    def _ask(self, window: _Window, stream: int, shard: int, plan: ShardPlan, block: int, *, hurry: bool) -> None:
        """Ask for a block, together with its neighbours that the window wants and that are not at hand."""

        def joins(new: int, first: int, last: int) -> bool:
            place = (stream, shard, new)
            if hurry or place not in window.wanted or place in self._alive:
                return False
            size = int(plan.offset[last] + plan.length[last] - plan.offset[first])
            # only what touches in the file
            return size == int(plan.length[first : last + 1].sum()) and size <= REQUEST_BYTES

        first = last = block
        while joins(last + 1, first, last + 1):
            last += 1
        while joins(first - 1, first - 1, last):
            first -= 1
        read = self._source.read(stream, shard, plan, first, last + 1)
        for i in range(first, last + 1):
            window.held[stream, shard, i] = self._alive[stream, shard, i] = BlockReference(read, i - first)

    def _selected(self, stream: int, shard: int) -> Integers | None:
        info = self._datasets.streams[stream]
        return self._datasets.selected(info.dataset, shard, info.bucket)
