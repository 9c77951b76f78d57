"""A whole epoch of all ranks: which blocks each window of each position reads, in which requests, at which step.

An epoch's samples stand in one line, shard behind shard, so what a window reads is a range of that line, widened to
whole blocks. It leaves out the block that the same position still holds from its window before, and the one that a
neighbouring position of the same rank has read. A request ends with its shard, or with `REQUEST_BYTES`.

What it takes for granted, as nothing is shuffled here: a window's blocks are asked for when it is entered (the loader
asks for what exceeds one request when it is needed); a range that exceeds one request is cut from its beginning; runs
are longer than a block; what an epoch ends with is not by chance what the next one begins with. For some of the steps
`steps.py` has the loader's own planner do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.order import Integers, Order, Stream
from pipeline.data.planner import REQUEST_BYTES


@dataclass(frozen=True)
class Blocks:
    """How samples are stored: alike in all shards and picture sizes."""

    samples: int  # of a block, but for the last of each shard and picture size
    sample_bytes: int  # in the tar, headers included

    @property
    def in_request(self) -> int:
        """Whole blocks that one request asks for at most."""
        return max(1, REQUEST_BYTES // (self.samples * self.sample_bytes))


@dataclass
class EpochPlan:
    """Totals of one epoch over all streams and ranks."""

    samples: int = 0
    steps: int = 0  # that lie wholly inside the epoch
    blocks: int = 0  # of the data
    requests: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    receipts: int = 0
    windows: int = 0
    window_samples: int = 0  # of the blocks that the windows cover
    first_step: int = 0  # requests of the epoch's first step, all nodes
    largest_step: int = 0  # of any later one
    first_node_step: int = 0  # the same of the node that has most
    largest_node_step: int = 0

    @property
    def blocks_read_again(self) -> int:
        """Reads of blocks that are cut by a border of two ranks, or of an epoch's first or last batch."""
        return self.blocks_read - self.blocks


def plan_epoch(order: Order, epoch: int, blocks: Blocks, ranks: int, ranks_per_node: int) -> EpochPlan:
    """What all ranks read in one epoch of each stream.

    Args:
        order: of the run, where every group is one stream by itself, of at least two batches.
        epoch: the same of every stream.
        blocks: how samples are stored.
        ranks: of the run.
        ranks_per_node: GPUs of a node.
    """
    plan = EpochPlan()
    for stream in order.streams:
        rank = np.arange(stream.quota, dtype=np.int64) * ranks // stream.quota
        one = _Epoch(stream, epoch, blocks, rank)
        one.add_windows(plan, rank // ranks_per_node)
        one.add_borders(plan)
        plan.samples += stream.samples
        plan.blocks += int((-(-stream.sizes // blocks.samples)).sum())
    return plan


class _Epoch:
    """One stream's epoch; ranges count through its line of samples. Legend: q positions."""

    def __init__(self, stream: Stream, epoch: int, blocks: Blocks, rank: Integers) -> None:
        self._stream, self._epoch, self._blocks, self._rank = stream, epoch, blocks, rank
        self._positions = np.arange(stream.quota, dtype=np.int64)
        self._windows = stream.windows(epoch, self._positions)
        self._first = np.min([first for first, _ in self._windows], axis=0)  # of each position's run, [q]
        self._end = np.max([end for _, end in self._windows], axis=0)
        self._least, self._most = self._own()

    def add_windows(self, plan: EpochPlan, node: Integers) -> None:
        """What the windows read; `node` [q] is each position's."""
        steps = int(self._end[0] - self._first[0])
        by_step = np.zeros((int(node[-1]) + 1, steps), np.int32)
        entered, held_low, held_high = (np.zeros_like(self._positions) for _ in range(3))
        back = self._positions % 2 == 1
        for first, end in self._windows:
            (here,) = np.nonzero(first < end)
            low, high = self._widened(first[here], end[here])
            plan.windows += len(here)
            plan.window_samples += int((high - low).sum())
            asked_low = np.where(back[here], low, np.maximum(low, held_high[here]))
            asked_high = np.where(back[here] & (entered[here] > 0), np.minimum(high, held_low[here]), high)
            asked_low = np.maximum(asked_low, self._least[here])
            asked_high = np.minimum(asked_high, self._most[here])
            requests = self._add_reads(plan, asked_low, asked_high)
            np.add.at(by_step, (node[here], entered[here]), requests)
            held_low[here], held_high[here] = low, high
            entered += end - first
        plan.steps += steps
        plan.first_step += int(by_step[:, 0].sum())
        plan.first_node_step = max(plan.first_node_step, int(by_step[:, 0].max()))
        plan.largest_step = max(plan.largest_step, int(by_step[:, 1:].sum(0).max(initial=0)))
        plan.largest_node_step = max(plan.largest_node_step, int(by_step[:, 1:].max(initial=0)))

    def add_borders(self, plan: EpochPlan) -> None:
        """The batches at the epoch's borders, whose positions read in order, block by block; and all receipts."""
        head = np.arange(self._first[0], dtype=np.int64)
        tail = np.arange(self._end[-1], self._stream.samples, dtype=np.int64)
        owners = np.concatenate([self._rank[len(self._rank) - len(head) :], self._rank[: len(tail)]])
        places = np.concatenate([head, tail])
        if len(places):
            low, high = self._widened(places, places + 1)
            _, kept = np.unique(np.stack([owners, low]), axis=1, return_index=True)
            self._add_reads(plan, low[kept], high[kept])
            shard = self._stream.locate(self._epoch, places)[0]
            plan.receipts += np.unique(np.stack([owners, shard]), axis=1).shape[1]
        begins = np.flatnonzero(np.diff(self._rank, prepend=-1))
        at, ends = self._first[begins], np.append(self._first[begins[1:]], self._end[-1])
        while len(at):  # from shard to shard
            plan.receipts += len(at)
            at = self._shard_end(at)
            at, ends = at[at < ends], ends[at < ends]

    def _add_reads(self, plan: EpochPlan, low: Integers, high: Integers) -> Integers:
        """Count the blocks of each range, which may be empty; returns how many requests each takes."""
        requests = np.zeros_like(low)
        plan.bytes_read += int(np.maximum(high - low, 0).sum()) * self._blocks.sample_bytes
        (todo,) = np.nonzero(low < high)
        at = low[todo]
        while len(todo):
            stop = np.minimum(self._shard_end(at), high[todo])
            blocks = -(-(stop - at) // self._blocks.samples)
            plan.blocks_read += int(blocks.sum())
            requests[todo] += -(-blocks // self._blocks.in_request)
            more = stop < high[todo]
            todo, at = todo[more], stop[more]
        plan.requests += int(requests.sum())
        return requests

    def _widened(self, first: Integers, end: Integers) -> tuple[Integers, Integers]:
        """Ranges, none of them empty, widened to whole blocks."""
        low = first - self._stream.locate(self._epoch, first)[1] % self._blocks.samples
        shard, last = self._stream.locate(self._epoch, end - 1)
        full = (last // self._blocks.samples + 1) * self._blocks.samples
        return low, end - 1 - last + np.minimum(full, self._stream.sizes[shard])

    def _shard_end(self, at: Integers) -> Integers:
        shard, sample = self._stream.locate(self._epoch, at)
        return at - sample + self._stream.sizes[shard]

    def _own(self) -> tuple[Integers, Integers]:
        """The widened part of the line that each position reads: of two in a rank, a block is read by the earlier."""
        least, most = self._widened(self._first, self._end)
        border = self._end[:-1]
        (cut,) = np.nonzero((least[1:] < border) & (self._rank[1:] == self._rank[:-1]))
        block_first, block_end = self._widened(border[cut] - 1, border[cut])
        lower, upper = np.full_like(cut, -1), np.full_like(cut, -1)
        at_lower, at_upper = np.zeros_like(cut), np.zeros_like(cut)  # steps at which the windows are entered
        for first, end in self._windows:
            lower = np.where((lower < 0) & (end[cut] > block_first) & (first[cut] < end[cut]), at_lower, lower)
            reached = (first[cut + 1] < block_end) & (first[cut + 1] < end[cut + 1])
            upper = np.where((upper < 0) & reached, at_upper, upper)
            at_lower, at_upper = at_lower + (end - first)[cut], at_upper + (end - first)[cut + 1]
        later = upper < lower
        most[cut[later]] = block_first[later]
        least[cut[~later] + 1] = block_end[~later]
        return least, most
