"""May a worker of `lathe encode` start again? `python -m pipeline.encode.attempts`, asked by a scheduler's script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline import runfile
from pipeline.config import EncodeConfig
from pipeline.data.manifest import RECEIPT_SUFFIX
from pipeline.encode.share import find_share
from pipeline.encode.sources import find_sources, output_urls
from pipeline.errors import StorageError
from pipeline.runtime.attempts import Notes, main
from pipeline.storage import open_store


def outcome(config: str, overrides: list[str], file: Path) -> tuple[bool, int | None, Notes]:
    """How many shards of a worker's share are done, and where its record is: not in the data set.

    Raises:
        ConfigError, DataError: of the run file, the share or the image shards.
    """
    settings = runfile.load(EncodeConfig, config, overrides)
    share = find_share(None, os.environ)
    return False, _done(settings, share.index, share.count), Notes(str(file.parent), file.name)


def _done(config: EncodeConfig, index: int, count: int) -> int | None:
    """Shards with a receipt, over all resolutions; -1 = there is none, None = storage does not tell."""
    try:
        mine = {source.shard + RECEIPT_SUFFIX for source in find_sources(config)[index::count]}
        outputs = output_urls(config).values()
        return sum(entry.name in mine for url in outputs for entry in open_store(url).list()) or -1
    except StorageError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], outcome))
