"""May `lathe train-vae` start again? Asked by the script that a scheduler runs, as `pipeline.train.attempts` is.

It saves by its schedule alone, so that being asked to stop counts as a failure: an endless row of starts would come of
checkpoints that are further apart than the job has time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import runfile
from pipeline.config import FirstStageConfig
from pipeline.errors import StorageError
from pipeline.runtime.attempts import Notes, main
from pipeline.storage import open_store
from pipeline.train import first_stage_checkpoint as checkpoint


def outcome(config: str, overrides: list[str], file: Path) -> tuple[bool, int | None, Notes]:
    """False, the step of the newest checkpoint, and where the record is: not in the autoencoder's folder.

    Raises:
        ConfigError: of the run file.
    """
    settings = runfile.load(FirstStageConfig, config, overrides)
    notes = Notes(str(file.parent), file.name)
    try:
        return False, checkpoint.newest_step(open_store(settings.output)), notes
    except StorageError:
        return False, None, notes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], outcome))
