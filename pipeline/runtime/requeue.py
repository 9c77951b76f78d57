"""The requeue file: what the script that started a run learns of it, since launchers may swallow exit codes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from pipeline.errors import StorageError

VARIABLE = "LATHE_REQUEUE_FILE"
"""Names the file, on the machine of rank 0. Not set: there is none."""


def check() -> None:
    """Whether it could be written; one that is there stays.

    Raises:
        StorageError: it is no regular file, or could not be written when it is needed.
    """
    file = _file()
    if file is None:
        return
    if file.exists() and not file.is_file():
        raise StorageError(f"{VARIABLE}={file} is no file, and would be replaced by one", "name another, or unset it")
    try:
        _partial(file).touch()
        _partial(file).unlink()
    except OSError as error:
        raise _problem(file, error) from error


def clear() -> None:
    """At a start: what an earlier one left says nothing of this one. Raises as `check`."""
    check()
    file = _file()
    if file is None:
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise _problem(file, error) from error


def is_asked() -> bool:
    """Whether another start was asked for since `clear`."""
    file = _file()
    return file is not None and file.exists()


def ask(*, stopped_by: int, step: int | None = None, steps: int | None = None, checkpoint: str = "") -> None:
    """Ask for another start, whole or not at all; on rank 0, once the checkpoint is complete.

    Args:
        stopped_by: the signal.
        step: steps done; None = stopped before the first one of this start.
        steps: of the whole run.
        checkpoint: address of the one that was saved; empty = none was.

    Raises:
        StorageError: it cannot be written.
    """
    file = _file()
    if file is None:
        return
    told = {"step": step, "steps": steps, "signal": signal.Signals(stopped_by).name, "checkpoint": checkpoint}
    try:
        _partial(file).write_text(json.dumps(told) + "\n", encoding="utf-8")
        _partial(file).replace(file)
    except OSError as error:
        raise _problem(file, error) from error


def _file() -> Path | None:
    name = os.environ.get(VARIABLE, "")
    place = os.environ.get("RANK") or os.environ.get("NODE_RANK") or "0"  # of a rank, or of a node's launcher
    return Path(name).resolve() if name and place == "0" else None


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _problem(file: Path, error: OSError) -> StorageError:
    return StorageError(f"{VARIABLE}={file}: {error.strerror}", "name a file that can be written, in a folder there is")
