"""Lathe's own loader at the same work as `peers`, in a process of its own.

    python -m pipeline.operate.bench.loader.ours '{"manifest": "...", "samples": 16384, "workers": 0}'

Commands: `epoch`, `order`, `ranges`, `start`, `peak`. An epoch is as many steps as it takes, of a loader that stays
open. What was read ahead while it was idle goes first and is not counted, as much is ahead again in the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

from pipeline.config import DataSetConfig, LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.operate.bench.loader.peers import serve
from pipeline.operate.bench.peak import peak_bytes
from pipeline.storage import Store

LEAST_READ = 0.9  # of the data, in each epoch: else they were in memory since the last one


@dataclass(frozen=True)
class Work:
    """What is asked of the loader. The global batch divides the samples, so that an epoch has whole batches."""

    manifest: str
    samples: int
    workers: int = 0  # threads
    batch: int = 64
    window: int = 256
    seed: int = 0
    start_step: int = 0

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return self.samples // self.batch


class _Recorded:
    """A store that notes which ranges it was asked for."""

    def __init__(self, store: Store, ranges: list[tuple[str, int, int]]) -> None:
        self._store, self._ranges = store, ranges

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        if start is not None and end is not None:
            self._ranges.append((name, start, end))
        return self._store.read(name, start, end)


class Bench:
    """Answers the commands."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._config = LoaderConfig(workers=work.workers)
        self._loader: LatentLoader | None = None

    def epoch(self) -> dict[str, Any]:
        """Consume as many steps as an epoch has. Raises AssertionError where it had the data from the last one."""
        if self._loader is None:
            self._loader = self.opened()
        for _ in range(self._config.steps_ahead + self._config.workers + 1 if self._config.workers else 0):
            next(self._loader)
        begun, cpu = time.perf_counter(), time.process_time()
        samples = sum(_consume(next(self._loader)) for _ in range(self._work.steps))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        received = self._loader.counts["bytes_read"]
        there = sum(shard.bytes for shard in self._loader.datasets.manifests[0].shards)
        epochs = self._loader.state_dict()["step"] / self._work.steps
        if received < LEAST_READ * there * epochs:
            raise AssertionError(f"{received} bytes were read in {epochs:.2f} epochs of {there}: take a smaller window")
        return {"samples": samples, "seconds": seconds, "cpu_seconds": cpu, "bytes_read": received}

    def order(self) -> dict[str, Any]:
        """The numbers of one epoch's samples as they come, by batch."""
        with self.opened() as loader:
            return {"batches": [[int(key) for key in next(loader).keys] for _ in range(self._work.steps)]}

    def ranges(self) -> dict[str, Any]:
        """The ranges of bytes that are asked for while an epoch is read, as many as make up the data."""
        datasets, asked = self._datasets(), list[tuple[str, int, int]]()
        stores = tuple(cast(Store, _Recorded(store, asked)) for store in datasets.stores)
        with self.opened(replace(datasets, stores=stores)) as loader:
            for _ in range(self._work.steps):
                next(loader)
        ends = accumulate(end - start for _, start, end in asked)
        there = sum(shard.bytes for shard in datasets.manifests[0].shards)
        return {"ranges": [one for one, end in zip(asked, ends, strict=True) if end <= there]}

    def start(self) -> dict[str, Any]:
        """Seconds from nothing but imports to the first batch."""
        begun = time.perf_counter()
        datasets = self._datasets()
        opened = time.perf_counter()
        with self.opened(datasets) as loader:
            _consume(next(loader))
            return {"first_seconds": time.perf_counter() - begun, "manifest_seconds": opened - begun}

    def peak(self) -> dict[str, Any]:
        """Peak memory after an epoch, in bytes."""
        self.epoch()
        return {"peak_bytes": peak_bytes()}

    def close(self) -> None:
        """Stop the loader's threads."""
        if self._loader is not None:
            self._loader.close()

    def _datasets(self) -> DataSets:
        return open_datasets([DataSetConfig(manifest=self._work.manifest)], global_batch=self._work.batch)

    def opened(self, datasets: DataSets | None = None) -> LatentLoader:
        """A loader from the first step on."""
        work = self._work
        return LatentLoader(
            datasets or self._datasets(),
            global_batch=work.batch,
            seed=work.seed,
            window=work.window,
            start_step=work.start_step,
            config=self._config,
        )


def _consume(batch: Batch) -> int:
    """The batch's samples; one element of every tensor is read, as of the peers'."""
    batch.moments[-1].flatten()[-1].item()
    for text in batch.text.values():
        for tensor in (text.embeddings, text.tokens):
            if tensor is not None:
                tensor[-1].flatten()[-1].item()
    return int(batch.weight.sum())


def main() -> None:
    """Serve, with what others print kept out of the answers."""
    commands: Iterator[str] = iter(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        bench = Bench(Work(**json.loads(sys.argv[1])))
        try:
            serve(bench, commands, answers)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
