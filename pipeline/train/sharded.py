"""A running engine to and from a checkpoint: all ranks write and read their fragments together.

The layout on disk is described in `pipeline.train.checkpoint`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from pipeline.errors import DataError, LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train.checkpoint import (
    COMPLETE,
    DONE,
    FORMAT_VERSION,
    FROZEN,
    RUN,
    Checkpoint,
    DamagedError,
    as_json,
    clear,
    noted,
    step_name,
)

FAULTS = (LatheError, OSError, SafetensorError, LookupError, ValueError)
"""What may go wrong where state is written or read."""
_log = logging.getLogger(__name__)


def save(
    store: Store,
    process: Process,
    engine: Engine,
    *,
    step: int,
    texts: Mapping[str, bytes],
    counters: Mapping[str, int],
    notes: Mapping[str, Any],
    keys: Sequence[str] | None = None,
) -> int:
    """Write a checkpoint; all ranks call it at the same step. Earlier checkpoints are not touched.

    Args:
        store: the run's output.
        process: this rank.
        engine: whose state is saved.
        step: steps done.
        texts: files that are written as they are, such as config.yaml.
        counters: numbers that `restore` gives back, with `step` and `optimizer_step`.
        notes: of this rank alone, for JSON; see `Checkpoint.notes`.
        keys: which of `state.keys`; None = all, and only then can a training go on from it.

    Returns:
        bytes of all files on rank 0, and 0 elsewhere.

    Raises:
        StorageError: on the rank that could not write; LatheError on the others.
    """
    name, kept = step_name(step), tuple(keys or state.keys(engine))
    together(process, lambda: clear(store, name) if process.is_main else None)
    together(process, lambda: _write_fragments(store, name, process, engine, notes=notes, keys=kept))
    frozen = state.frozen(engine, keep=process.is_main)
    files: dict[str, dict[str, Any]] = {}

    def conclude() -> None:
        if process.is_main:
            everything = {**counters, "step": step, "optimizer_step": state.optimizer_step(engine)}
            run = {
                "format_version": FORMAT_VERSION,
                "counters": everything,
                "parameters": state.shapes(engine),
                "keys": kept,
            }
            files.update(_write_once(store, name, {**texts, RUN: as_json(run), FROZEN: tensor_bytes(frozen)}))
            files.update(_collect(store, name, process.world_size))
            store.write(f"{name}/{COMPLETE}", as_json({"files": files}))

    together(process, conclude)
    return sum(int(file["size"]) for file in files.values())


def restore(
    checkpoint: Checkpoint, process: Process, engine: Engine, check: Callable[[Checkpoint], None]
) -> dict[str, int] | None:
    """Put a checkpoint's state into the engine, at any world size and from any engine; all ranks call it.

    Args:
        checkpoint: what is read.
        process: this rank.
        engine: of the same geometry; its state is overwritten.
        check: raises where this checkpoint must not be resumed; called before anything is touched.

    Returns:
        the counters that were saved; None where a file is damaged, which one rank logs, and the engine's state is
        then undefined.

    Raises:
        DataError: another geometry, or averages alone.
    """
    counters: dict[str, int] = {}
    frozen: dict[str, Tensor] = {}
    damage: list[DamagedError] = []

    def read() -> None:
        try:
            check(checkpoint)
            run = checkpoint.run()
            _check_keys(checkpoint, run["keys"], state.keys(engine))
            _check_geometry(checkpoint, run["parameters"], state.shapes(engine))
            fill(checkpoint, engine, {key: key for key in state.keys(engine)}, run["parameters"])
            frozen.update(read_tensors(checkpoint.read(FROZEN)))
            counters.update(run["counters"])
        except DamagedError as error:
            damage.append(error)

    together(process, read)
    teller = process.first(bool(damage))
    if teller is not None:
        if process.rank == teller:
            _log.warning("%s; the checkpoint is passed over", damage[0].message)
        return None
    state.set_frozen(engine, frozen)
    state.restore(engine, counters["optimizer_step"])
    return counters


def together(process: Process, work: Callable[[], object]) -> None:
    """Do this rank's part, then wait for the others'.

    Raises:
        LatheError: what went wrong, on the rank where it did; that it did, on the others.
    """
    problem: Exception | None = None
    try:
        work()
    except FAULTS as error:
        problem = error
    process.agree(problem)


def _write_fragments(
    store: Store, name: str, process: Process, engine: Engine, *, notes: Mapping[str, Any], keys: Sequence[str]
) -> None:
    fragments = state.fragments(engine)
    tensors = {f"{f.parameter}:{f.offset}:{key}": f.tensors[key].cpu() for f in fragments for key in keys}
    stem = f"rank-{process.rank:05d}-of-{process.world_size:05d}"
    data = tensor_bytes(tensors)
    store.write(f"{name}/{stem}.safetensors", data)
    index = [(f.parameter, f.offset, f.length) for f in fragments]
    done = {"file": f"{stem}.safetensors", **noted(data), "fragments": index, "notes": dict(notes)}
    store.write(f"{name}/{stem}{DONE}", as_json(done))


def _write_once(store: Store, name: str, contents: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    for file, data in contents.items():
        store.write(f"{name}/{file}", data)
    return {file: noted(data) for file, data in contents.items()}


def _collect(store: Store, name: str, world_size: int) -> dict[str, dict[str, Any]]:
    """The ranks' files as their done-markers note them."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        marker = f"rank-{rank:05d}-of-{world_size:05d}{DONE}"
        data = store.read(f"{name}/{marker}")
        done = json.loads(data)
        files |= {marker: noted(data), done["file"]: {"size": done["size"], "sha256": done["sha256"]}}
    return files


def fill(checkpoint: Checkpoint, engine: Engine, sources: Mapping[str, str], names: Container[str]) -> None:
    """Copy into this rank's fragments what overlaps them, file by file; at the same world size that is one file.

    Args:
        checkpoint: of parameters of the same shapes.
        engine: whose fragments; tell all ranks by `state.restore`.
        sources: which of the checkpoint's keys goes into each of the engine's.
        names: of the parameters; others are left as they are.

    Raises:
        DamagedError: a file is damaged, or elements are missing.
    """
    wanted = {fragment.parameter: fragment for fragment in state.fragments(engine) if fragment.parameter in names}
    missing = {name: fragment.length for name, fragment in wanted.items()}
    for file, saved in checkpoint.fragment_files():
        overlaps = [(s, wanted[s[0]]) for s in saved if s[0] in wanted and _overlap(s, wanted[s[0]])]
        if not overlaps:
            continue
        tensors = read_tensors(checkpoint.read(file))
        for (name, offset, length), mine in overlaps:
            first, end = max(offset, mine.offset), min(offset + length, mine.offset + mine.length)
            for key, source_key in sources.items():
                target = mine.tensors[key]
                source = tensors[f"{name}:{offset}:{source_key}"][first - offset : end - offset]
                target[first - mine.offset : end - mine.offset].copy_(source)
            missing[name] -= end - first
    for name, count in missing.items():
        if count:
            where = f"{checkpoint.store.url}/{checkpoint.name}"
            raise DamagedError(f"{where}: {count} elements of {name} are missing", "use the checkpoint before it")


def _overlap(saved: tuple[str, int, int], mine: state.Fragment) -> bool:
    return saved[1] < mine.offset + mine.length and mine.offset < saved[1] + saved[2]


def _check_keys(checkpoint: Checkpoint, saved: Sequence[str], ours: Sequence[str]) -> None:
    missing = [key for key in ours if key not in saved]
    if missing:
        raise DataError(
            f"{checkpoint.store.url}/{checkpoint.name} cannot be trained on: it has no {', '.join(missing)}",
            "train into another output; snapshots and what `lathe ema` makes are for sampling alone",
        )


def _check_geometry(checkpoint: Checkpoint, saved: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise DataError(
                f"{checkpoint.store.url}/{checkpoint.name} is of another model: {name} has shape "
                f"{saved.get(name, 'none')} there and {ours.get(name, 'none')} here",
                "train into another output, or restore the model's geometry in the run file",
            )
