"""Planned steps to batches, once their blocks are here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets
from pipeline.data.fetch import BlockReference
from pipeline.data.gather import gather
from pipeline.data.latent_block import LatentBlock
from pipeline.data.layout import Layout
from pipeline.data.manifest import key_hash
from pipeline.data.order import Integers
from pipeline.data.planner import PlannedStep
from pipeline.randomness import Purpose, uniform

_Row = tuple[LatentBlock, int] | None


class Assembler:
    """Makes batches; safe in threads.

    Args:
        datasets: what is read.
        layouts: of each stream.
        positions: the rank's, int64 [b].
        seed: of the run.
    """

    def __init__(self, datasets: DataSets, layouts: Sequence[Layout], positions: Integers, seed: int) -> None:
        self._datasets, self._layouts, self._positions, self._seed = datasets, layouts, positions, seed

    def batch(self, planned: PlannedStep) -> Batch:
        """The batch of a planned step. Raises what reading one of its blocks raised."""
        places = planned.places
        stream = int(places.stream[0])
        rows = [_loaded(row) for row in planned.rows]
        keys = ["" if row is None else row[0].keys[row[1]] for row in rows]
        captions, mirrored = self._draw(places.epoch, keys, rows)
        arrays = gather(rows, captions.tolist(), mirrored.tolist(), self._layouts[stream])
        batch = Batch(
            step=planned.step,
            bucket=self._datasets.streams[stream].bucket,
            positions=torch.tensor(self._positions),
            epochs=torch.from_numpy(places.epoch),
            datasets=torch.tensor([self._datasets.streams[s].dataset for s in places.stream.tolist()]),
            shards=places.shard,
            moments=arrays.moments,
            text=arrays.text,
            size=arrays.size,
            weight=torch.tensor([float(row is not None) for row in rows]),
            mirrored=torch.from_numpy(mirrored),
            keys=keys,
            captions=captions.tolist(),
        )
        # a forked child cannot use CUDA
        pins = torch.cuda.is_available() and torch.utils.data.get_worker_info() is None
        return batch.pin_memory() if pins else batch

    def _draw(self, epochs: Integers, keys: Sequence[str], rows: Sequence[_Row]) -> tuple[Integers, NDArray[np.bool_]]:
        """The caption of each sample, and whether it is mirrored: drawn by (seed, epoch, key)."""
        counts = np.array([1 if row is None else row[0].captions(row[1]) for row in rows])
        flips = np.array([row is not None and row[0].mirrored for row in rows])
        captions, mirrored = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
        if counts.max() == 1 and not flips.any():
            return captions, mirrored
        hashes = torch.tensor([key_hash(key) >> 1 for key in keys])  # 63 bits, as int64 has no more
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            keyed = hashes[torch.from_numpy(here)]
            if counts.max() > 1:
                drawn = uniform(self._seed, Purpose.CAPTION_CHOICE, epoch, keyed, ()).double().numpy()
                captions[here] = (drawn * counts[here]).astype(np.int64)
            if flips.any():
                mirrored[here] = flips[here] & (uniform(self._seed, Purpose.FLIP, epoch, keyed, ()).numpy() < 0.5)
        return captions, mirrored


def _loaded(row: tuple[BlockReference, int] | None) -> _Row:
    if row is None or (block := row[0].get()) is None:
        return None
    return block, row[1]
