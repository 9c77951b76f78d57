"""Temporary folders; a full disk is told in words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import StorageError


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """A folder for the time of a `with`, where TMPDIR says or in the system's place for such.

    Args:
        purpose: a word in its name, for whoever finds what a killed process left.

    Raises:
        StorageError: it cannot be made, or the operating system refuses something in the body: the disk is full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f"lathe-{purpose}-") as folder:
            yield Path(folder)
    except OSError as error:
        said = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            f"temporary files cannot be written in {tempfile.tempdir or 'any of the usual folders'} ({said})",
            "set TMPDIR to a folder with more room, then run the same command again",
        ) from error
