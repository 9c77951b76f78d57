"""May a training start again? `python -m pipeline.train.attempts`, asked by the script that a scheduler runs."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.errors import StorageError
from pipeline.runtime import requeue
from pipeline.runtime.attempts import Notes, main
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint

RECORD = "attempts.json"


def outcome(config: str, overrides: list[str], file: Path) -> tuple[bool, int | None, Notes]:
    """Whether a run was asked to stop and left in order, the step of its newest checkpoint, and where its record is.

    While its output is away, the record is kept in a file of the job.

    Raises:
        ConfigError: of the run file.
    """
    output = runfile.load(TrainConfig, config, overrides).output
    notes = Notes(output, RECORD, spare=Notes(str(file.parent), file.name))
    return requeue.is_asked(), _step(open_store(output)), notes


def _step(store: Store) -> int | None:
    """Of the newest checkpoint; -1 = there is none, None = the store does not tell."""
    try:
        newest = checkpoint.latest(store)
    except StorageError:
        return None
    return -1 if newest is None else checkpoint.step_of(newest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], outcome))
