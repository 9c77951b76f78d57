"""What a process of a loader's tests runs: a rank that notes every sample it is given, a contestant of the bench."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.config import DataSetConfig, LoaderConfig
from pipeline.data.batch import Batch
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import LatentLoader

GLOBAL_BATCH, SEED, WINDOW = 8, 11, 12


def lines(batch: Batch) -> list[dict[str, Any]]:
    """Each sample: its step and place, what it is, and a hash of every byte of it."""
    found = []
    for i, key in enumerate(batch.keys):
        digest = hashlib.sha256()
        for array in (batch.moments, batch.size, batch.weight, batch.mirrored, batch.epochs):
            digest.update(array[i].numpy().tobytes())
        for name, tower in sorted(batch.text.items()):
            digest.update(name.encode())
            for part in (tower.tokens, tower.embeddings, tower.pooled, tower.mask):
                digest.update(b"none" if part is None else part[i].numpy().tobytes())
        found.append(
            {
                "step": batch.step,
                "position": int(batch.positions[i]),
                "bucket": list(batch.bucket),
                "key": key,
                "caption": batch.captions[i],
                "hash": digest.hexdigest(),
            }
        )
    return found


def run(
    urls: list[str], rank: int, world: int, state: dict[str, Any], stop: int, workers: int, mixing: str, notes: Path
) -> None:
    """Read the steps from `state["step"]` to `stop`; every step is in `notes` before the next one is asked for."""
    sources = [DataSetConfig(manifest=url) for url in urls]
    config = LoaderConfig(workers=workers, mixing=mixing)  # type: ignore[arg-type]
    datasets = open_datasets(sources, global_batch=GLOBAL_BATCH, mixing=config.mixing)
    with (
        notes.open("a") as file,
        LatentLoader(
            datasets,
            global_batch=GLOBAL_BATCH,
            seed=SEED,
            window=WINDOW,
            rank=rank,
            world_size=world,
            start_step=state["step"],
            skipped=state["skipped"],
            config=config,
        ) as loader,
    ):
        while loader.state_dict()["step"] < stop:
            batch = next(loader)
            file.write(json.dumps({"samples": lines(batch), "state": loader.state_dict()}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def answer(bench: type, work: Any, line: Connection) -> None:
    """Do what the other end of the line asks for, until it is closed."""
    multiprocessing.set_start_method("fork", force=True)  # of a DataLoader's workers, as in a program of its own
    with closing(bench(work)) as asked, suppress(EOFError):
        while True:
            line.send(getattr(asked, line.recv())())
