"""Checkpoints by two ranks: saved, restored, failed, damaged; snapshots; groups with a rate of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline import runfile
from pipeline.config import EMAConfig, TrainCheckpointConfig, TrainConfig
from pipeline.data.threads import WorkerThreads
from pipeline.errors import LatheError, StorageError
from pipeline.runtime import state
from pipeline.runtime.process import Process
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint, sharded, snapshots
from pipeline.train.optimizer import parameter_groups
from pipeline.train.snapshots import Snapshots
from rank_checks.nets import (
    AVERAGES,
    KEYS,
    RATE,
    WEIGHT_DECAY,
    build,
    inputs,
    net,
    same,
    save,
    train,
    worst,
)

OF_THE_LAST_RANK = "rank-00001-of-00002.safetensors"


def own_rate(ranks: Process, folder: Path) -> dict[str, Any]:
    """A part of the model learns at a tenth of the rate; what is saved of it fits an engine with other groups."""
    ratios = {"inner.3.": 0.1}
    built, module = build(ranks, 2, "float32", fused=False, ratios=ratios), net()
    train(built, inputs()[:3])
    groups = [{**g, "lr": RATE * g["rate_ratio"]} for g in parameter_groups(module, WEIGHT_DECAY, ratios)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for x in inputs()[:3]:
        optimizer.zero_grad()
        (module(x) - x).square().mean().backward()
        optimizer.step()
    store, plain = open_store(str(folder / "own-rate")), build(ranks, 1, "float32")
    save(store, ranks, built, step=3)
    (saved,) = checkpoint.find(store)
    sharded.restore(saved, ranks, plain, lambda _: None)
    expected = dict(module.named_parameters())
    groups_of = [len(one.optimizer.param_groups) for one in (built, plain)]
    return {"groups": groups_of, "weight": [worst(one, expected, state.WEIGHT) for one in (built, plain)]}


class Watched:
    """A store that counts what is read, and on some ranks fails where it is told to."""

    def __init__(self, store: Store) -> None:
        self._store, self.url, self.markers_read, self.broken = store, store.url, 0, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, data: bytes) -> bool:
        if self.broken == "write":
            raise StorageError("cannot write", "make room")
        return self._store.write(name, data)

    def delete(self, names: Iterable[str]) -> None:
        if (names := list(names)) and self.broken == "delete":
            raise StorageError("cannot delete", "mend the store")
        self._store.delete(names)

    def read(self, name: str) -> bytes:
        self.markers_read += name.endswith(checkpoint.COMPLETE)
        return self._store.read(name)


def snapshotting(ranks: Process, folder: Path) -> dict[str, Any]:
    """Snapshots of the power function average alone, of one course, and what becomes of a failing store."""
    ema = EMAConfig(averages=AVERAGES, snapshot_every=2, snapshot_keep=3)
    saves = TrainCheckpointConfig(max_failures=1)
    config = TrainConfig(manifest="m", output=str(folder / "snapped"), steps=9, ema=ema, checkpoint=saves)
    run, built = open_store(config.output), build(ranks, 2, "float32", fused=False)
    texts = {checkpoint.CONFIG: runfile.dump(config).encode()}
    store = Watched(snapshots.snapshot_store(run))
    snapshots.snapshot_store = lambda _: store  # type: ignore[assignment]
    worker = WorkerThreads(1, "save")

    def taken() -> list[int]:
        return [found.step for found in checkpoint.find(store)]

    def attempt(what: Callable[[], object]) -> str:
        try:
            what()
        except LatheError as error:
            return error.message
        return ""

    def resumed(step: int) -> Snapshots:
        found = Snapshots(run, ranks, built, config, worker, texts=texts, step=step)
        found.saver.settle()
        gone.append(found.gone)
        seen.append(taken())
        return found

    def take(step: int) -> None:
        taker.take(step)
        taker.saver.settle()

    gone: list[list[str]] = []
    seen: list[list[int]] = []
    taker = resumed(0)
    take(0)
    for step, x in enumerate(inputs(9), start=1):
        train(built, x[None])
        if snapshots.due(config, step):
            take(step)
    if ranks.is_main:
        markers_read = store.markers_read
    seen.append(taken())
    (newest, *_) = checkpoint.find(store)
    refused = attempt(lambda: sharded.restore(newest, ranks, built, lambda _: None))
    missed = [snapshots.is_missing(run, config, step) for step in (6, 7, 4, 9)]
    ranks.agree()
    resumed(8)  # back by one: that of step 9 is of an abandoned course
    ranks.agree()
    if ranks.is_main:
        checkpoint.clear(store, checkpoint.step_name(8))
    ranks.agree()
    taker = resumed(8)  # as after a kill between checkpoint and snapshot
    take(10)
    store.broken = "delete" if ranks.is_main else ""
    failures = [attempt(lambda: take(12))]  # that of step 6 is too old then
    failures.append(attempt(lambda: resumed(4)))
    store.broken = "write" if not ranks.is_main else ""
    failures.append(attempt(lambda: take(14)))
    worker.close(5)
    return {
        "taken": seen,
        "gone": gone,
        "markers_read": markers_read if ranks.is_main else 0,
        "refused": refused,
        "missed": missed,
        "failures": failures,
    }


def saving(ranks: Process, folder: Path) -> dict[str, Any]:
    """Save after three steps; a second engine, restored, goes on as the first does."""
    store = open_store(str(folder / "run"))
    first = build(ranks, 2, "float32")
    train(first, inputs()[:3])
    size = save(
        store, ranks, first, step=3, texts={"note.txt": b"x"}, counters={"skipped": 2}, notes={"rank": ranks.rank}
    )
    second = build(ranks, 1, "float32")
    (saved,) = checkpoint.find(store)
    assert size == (sum(f["size"] for f in saved.files.values()) if ranks.is_main else 0)
    counters = sharded.restore(saved, ranks, second, lambda _: None)
    restored = same(first, second)
    losses = [train(built, inputs()[3:]) for built in (first, second)]
    after = same(first, second)
    if ranks.is_main:
        (folder / "losses.json").write_text(json.dumps(losses[0]))
    noted = saved.notes()
    return {"counters": counters, "notes": noted, "restored": restored, "losses": losses, "after": after}


def failing_save(ranks: Process, folder: Path) -> dict[str, Any]:
    """The last rank cannot write: all ranks are told, and the checkpoint before is still the newest."""

    class Full:
        url = str(folder / "run")

        def __getattr__(self, name: str) -> Any:
            return getattr(open_store(self.url), name)

        def write(self, name: str, data: bytes) -> bool:
            if ranks.rank == ranks.world_size - 1:
                raise StorageError("no space left", "make room")
            return open_store(self.url).write(name, data)

    try:
        save(Full(), ranks, build(ranks, 2, "float32"), step=4)  # type: ignore[arg-type]
    except LatheError as error:
        return {"error": error.message, "exit_code": error.exit_code, "latest": checkpoint.latest(open_store(Full.url))}
    return {}


def damaged(ranks: Process, folder: Path, name: str) -> dict[str, Any]:
    """One byte of a file is changed: no rank takes the checkpoint."""
    store = open_store(str(folder / "run"))
    (saved,) = checkpoint.find(store)
    file = folder / "run" / saved.name / name
    whole = file.read_bytes()
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ranks.agree()
    result = sharded.restore(saved, ranks, build(ranks, 2, "float32"), lambda _: None)
    ranks.agree()
    if ranks.is_main:
        file.write_bytes(whole)
    ranks.agree()
    return {"restored": result is not None}


def elsewhere(ranks: Process, folder: Path) -> dict[str, Any]:
    """What two ranks saved, restored by this many."""
    (saved,) = checkpoint.find(open_store(str(folder / "run")))
    built = build(ranks, 2, "float32")
    counters = sharded.restore(saved, ranks, built, lambda _: None)
    found = {key: checkpoint.load_weights(saved.store, saved.name, key.removeprefix("ema.")) for key in KEYS}
    return {
        "counters": counters,
        "ema": [worst(built, found[key], key) for key in KEYS],
        "losses": train(built, inputs()[3:]),
    }
