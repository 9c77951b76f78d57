"""Some steps of some ranks, planned by the loader's own planner, from blocks that nobody reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockReference, BlockSource
from pipeline.data.order import Integers, Order, rank_positions
from pipeline.data.planner import Planner
from pipeline.data.shard_plan import ShardPlan
from pipeline.operate.bench.scaling.epoch import Blocks


class SimulatedSource(BlockSource):
    """Counts what it is asked for: `requests`, `blocks_read`, `bytes_read`, as a loader does.

    Args:
        datasets: whose shards' sizes are believed.
        blocks: how their samples are stored.
    """

    def __init__(self, datasets: DataSets, blocks: Blocks) -> None:
        self._datasets, self._blocks = datasets, blocks
        self._plan = cache(self._new_plan)
        self.counts: Counter[str] = Counter()

    def plans(self, wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], ShardPlan | None]:
        """As receipts would tell them."""
        streams = self._datasets.streams
        return {(stream, shard): self._plan(int(streams[stream].sizes[shard])) for stream, shard in wanted}

    def read(self, stream: int, shard: int, plan: ShardPlan, blocks: Sequence[int]) -> list[BlockReference]:
        """Nothing."""
        del stream, shard
        self.counts.update(requests=1, blocks_read=len(blocks), bytes_read=int(plan.length[list(blocks)].sum()))
        return [BlockReference(lambda data: None) for _ in blocks]

    def _new_plan(self, size: int) -> ShardPlan:
        starts = np.arange(0, size, self._blocks.samples, dtype=np.int64)
        samples = np.diff(starts, append=size)
        lengths = samples * self._blocks.sample_bytes
        nothing = np.zeros_like(starts)
        return ShardPlan(0, nothing, starts, samples, starts * self._blocks.sample_bytes, lengths, nothing)


@dataclass(frozen=True)
class Steps:
    """What some ranks asked for together, step by step; all arrays [steps]."""

    requests: Integers
    blocks_read: Integers
    bytes_read: Integers


def plan_steps(
    datasets: DataSets,
    order: Order,
    blocks: Blocks,
    steps: range,
    *,
    ranks: Iterable[int],
    world_size: int,
    hurried: int = 0,
) -> Steps:
    """Plan steps of some ranks, started at the first of them.

    Args:
        datasets: what is read.
        order: of the run.
        blocks: how samples are stored.
        steps: which.
        ranks: which.
        world_size: how many there are.
        hurried: steps of a start, and of each epoch, for which a loader asks block by block.

    Raises:
        ConfigError: the world size does not divide the global batch.
    """
    names = ("requests", "blocks_read", "bytes_read")
    found = np.zeros((len(steps), len(names)), np.int64)
    for rank in ranks:
        source = SimulatedSource(datasets, blocks)
        positions = rank_positions(order.global_batch, rank, world_size)
        planner = Planner(datasets, order, source, positions, origin=0, plans_kept=1024, hurried=hurried)
        for row, step in enumerate(steps):
            before = [source.counts[name] for name in names]
            planner.plan(step)
            found[row] += [source.counts[name] - old for name, old in zip(names, before, strict=True)]
    return Steps(*found.T)
