"""Loaders of data sets as tests want them, and a hash of each global batch that they give."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from loader_process import lines

from pipeline.config import DataSetConfig, LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.loader import LatentLoader


def data(*urls: str, batch: int = 8, mixing: str = "steps", **changes: Any) -> DataSets:
    return open_datasets([DataSetConfig(manifest=url, **changes) for url in urls], global_batch=batch, mixing=mixing)


def loader(sources: str | DataSets, **arguments: Any) -> LatentLoader:
    batch = arguments.pop("global_batch", 8)
    datasets = data(sources, batch=batch) if isinstance(sources, str) else sources
    config = LoaderConfig(**{k: arguments.pop(k) for k in list(arguments) if k in LoaderConfig.model_fields})
    return LatentLoader(datasets, global_batch=batch, **{"seed": 3, "window": 4, **arguments}, config=config)


def load(
    sources: str | DataSets, steps: int, *, start: int = 0, rank: int = 0, world: int = 1, **arguments: Any
) -> list[Batch]:
    with loader(sources, rank=rank, world_size=world, start_step=start, **arguments) as opened:
        return list(islice(opened, steps))


def digests(ranks: Sequence[Sequence[Batch]]) -> list[str]:
    """One hash of each global batch: keys, places, and every byte the network will see."""
    found = []
    for parts in zip(*ranks, strict=True):
        samples = [line for part in parts for line in lines(part)]
        assert [line["position"] for line in samples] == list(range(len(samples)))
        found.append(hashlib.sha256(json.dumps(samples).encode()).hexdigest())
    return found
