"""Local files that appear under their names whole, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import StorageError

PARTIAL = ".partial"
"""How the names of files end that are being written: `.NAME.HEX.partial`."""
_PARTIAL_NAME = re.compile(r"\.(.+)\.[0-9a-f]{12}\.partial", re.DOTALL)
_ANEW = 3
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # FAT, many mounts by FUSE


def write_whole(path: Path, fill: Callable[[BinaryIO], object], *, replace: bool = True) -> int:
    """Write a file through `fill`. It takes its name once it is on disk; on failure nothing is left.

    Where somebody sweeps the unfinished file, `fill` is called again with a new one. Returns the file's size.

    Raises:
        FileExistsError: the name is taken, and `replace` is off.
        OSError: as the operating system says; see `local.translated`.
        StorageError: it was swept again and again.
    """
    for tries_left in reversed(range(1 + _ANEW)):
        partial = path.with_name(f".{stem_of(path.name)}.{secrets.token_hex(6)}{PARTIAL}")
        try:
            with _create(partial) as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            if _take_name(partial, path, replace):
                break
        finally:
            partial.unlink(missing_ok=True)
        if not tries_left:
            raise StorageError(
                f"{path}: another process clears unfinished files here again and again",
                "end the other jobs that write to the same output, then run the same command again",
            )
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


def _take_name(partial: Path, path: Path, replace: bool) -> bool:
    """False: the partial file has been swept."""
    try:
        if replace:
            partial.replace(path)
        else:
            _take_free_name(partial, path)
    except FileNotFoundError:
        return False
    return True


def _take_free_name(partial: Path, path: Path) -> None:
    """Raises FileExistsError where the name is taken. Without hard links the file is seen empty for an instant."""
    try:
        path.hardlink_to(partial)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        path.open("xb").close()
        try:
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                if not path.stat().st_size:  # others may have taken an empty file for none, and written theirs
                    path.unlink()
            raise


def stem_of(name: str) -> str:
    """What a partial file's name says of the file's own name: all of it, as far as file systems take it."""
    raw = name.encode()
    if len(raw) <= 200:
        return name
    return f"{raw[:150].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def partial_of(name: str) -> str | None:
    """The stem of the file that a partial file was to become; None for other files."""
    found = _PARTIAL_NAME.fullmatch(name)
    return found[1] if found else None


def _create(path: Path) -> BinaryIO:
    for _ in range(10):  # `delete` elsewhere may take the emptied folder away in between
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("xb")
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
