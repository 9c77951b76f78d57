"""One demo in a folder at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import SetupError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. It is the kernel's, so a killed process leaves none behind.

    Raises:
        SetupError: another process holds it, or the folder cannot be written to.
    """
    try:
        file = (folder / "lock").open("a+")
    except OSError as error:
        raise SetupError(
            f"{folder} cannot be written to: {error.strerror}", "mend its permissions, or use another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise SetupError(
                f"another `lathe demo` is using {folder} (pid {file.read().strip() or 'unknown'})",
                "wait for it, stop it, or use another --dir",
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
