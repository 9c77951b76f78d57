"""A checkpoint into a running engine: all ranks read their fragments together. `pipeline.train.saver` writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from torch import Tensor

from pipeline.errors import DataError, LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.train.checkpoint import FROZEN, Checkpoint, DamagedError

FAULTS = (LatheError, OSError, SafetensorError, LookupError, ValueError)
"""What may go wrong where state is written or read."""
_log = logging.getLogger(__name__)


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
            _fill(checkpoint, engine)
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


def _fill(checkpoint: Checkpoint, engine: Engine) -> None:
    """Copy into this rank's fragments what overlaps them, file by file; at the same world size that is one file."""
    wanted = {fragment.parameter: fragment for fragment in state.fragments(engine)}
    missing = {name: fragment.length for name, fragment in wanted.items()}
    for file, saved in checkpoint.fragment_files():
        overlaps = [(s, wanted[s[0]]) for s in saved if s[0] in wanted and _overlap(s, wanted[s[0]])]
        if not overlaps:
            continue
        tensors = read_tensors(checkpoint.read(file))
        for (name, offset, length), mine in overlaps:
            first, end = max(offset, mine.offset), min(offset + length, mine.offset + mine.length)
            for key, target in mine.tensors.items():
                source = tensors[f"{name}:{offset}:{key}"][first - offset : end - offset]
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
