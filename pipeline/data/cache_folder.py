"""The folder of the block cache: its ledger, its entries, and what killed writers left in it.

lathe-blocks/ledger         two numbers, for one process at a time
lathe-blocks/3f/3f...       a block, by its name
lathe-blocks/partial/...    a block being written, locked by its writer
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = "lathe-blocks"
DIGEST_BYTES = 20
_NAME = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_COUNTS = struct.Struct("<qq")
_LEDGER = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # whoever opens a pipe would wait for its other end
_LEFT_FREE = 1 << 30


@dataclass
class Ledger:
    """Of all processes: bytes in the folder with those being written, and bytes ever reserved, which only grow."""

    used: int
    reserved: int


@dataclass
class OldEntries:
    """Entries from before a cache was opened, the one unused for longest first; 28 bytes of memory an entry."""

    digests: NDArray[np.uint8]  # [n, 20]
    used_at: NDArray[np.int64]  # [n], nanoseconds
    next: int = 0

    def any_before(self, moment: int) -> bool:
        """Is one left that was last used before that moment?"""
        return self.next < len(self.used_at) and bool(self.used_at[self.next] < moment)

    def take(self) -> tuple[str, int]:
        """Name and last use of the next one."""
        self.next += 1
        return self.digests[self.next - 1].tobytes().hex(), int(self.used_at[self.next - 1])


class CacheFolder:
    """`lathe-blocks` in a folder. All methods raise OSError; names must be hexadecimal digests.

    Attributes:
        root: the path of `lathe-blocks`.
        opened: the moment, in nanoseconds by the clock that the files' times are from.
    """

    def __init__(self, folder: Path) -> None:
        own = folder.absolute() / FOLDER
        self.root = str(own)
        own.parent.mkdir(parents=True, exist_ok=True)
        for path in (own, own / "partial", *(own / f"{i:02x}" for i in range(256))):
            _make_own(path)
        file = os.open(own / "ledger", _LEDGER | os.O_CREAT, 0o600)
        try:
            os.utime(file)
            self.opened = os.fstat(file).st_mtime_ns
        finally:
            os.close(file)

    def path(self, name: str) -> str:
        """Where a block lies. Raises ValueError: the name is no digest."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not from block_name")
        return f"{self.root}/{name[:2]}/{name}"

    def free_bytes(self) -> int:
        """What the disk has beyond a twentieth of it, 1 GiB at most, that a cache must not take."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize - min(_LEFT_FREE, disk.f_blocks * disk.f_frsize // 20)

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The ledger, locked. Each call opens it anew, so that the lock holds between threads and forks too."""
        file = os.open(f"{self.root}/ledger", _LEDGER)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                read = os.pread(file, _COUNTS.size, 0)
                before = _COUNTS.unpack(read) if len(read) == _COUNTS.size else (0, 0)
                ledger = Ledger(*before)
                try:
                    yield ledger
                finally:
                    if (ledger.used, ledger.reserved) != before:
                        os.pwrite(file, _COUNTS.pack(max(0, ledger.used), ledger.reserved), 0)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone is not enough where a fork has the file too
        finally:
            os.close(file)

    def start(self, size: int, ledger: Ledger) -> tuple[str, int]:
        """A file to be written, path and descriptor; under the ledger's lock. Its lock says that its writer lives."""
        path = f"{self.root}/partial/{secrets.token_hex(DIGEST_BYTES)}"
        file = os.open(path, _CREATE, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        ledger.used += size
        ledger.reserved += size
        return path, file

    def remove(self, path: str, ledger: Ledger) -> int:
        """Remove an entry, if it is there; the bytes that it had."""
        try:
            size = os.lstat(path).st_size
            Path(path).unlink()
        except FileNotFoundError:
            return 0
        ledger.used -= size
        return size

    def sweep(self) -> None:
        """Remove what killed writers left; under the ledger's lock, or a file just made may seem to be nobody's."""
        with os.scandir(f"{self.root}/partial") as found:
            left = [entry.path for entry in found if _NAME.fullmatch(entry.name)]
        for path in left:
            with suppress(OSError):  # it is locked, gone, or no file
                file = os.open(path, READ)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(path).unlink()
                finally:
                    os.close(file)

    def entries(self) -> tuple[int, OldEntries]:
        """The bytes of all entries, and those entries that were there before this folder was opened."""
        total, digests, times = 0, bytearray(), array("q")
        for i in range(256):
            with os.scandir(f"{self.root}/{i:02x}") as found:
                for entry in found:
                    if not _NAME.fullmatch(entry.name):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    total += status.st_size
                    if status.st_mtime_ns < self.opened:
                        digests += bytes.fromhex(entry.name)
                        times.append(status.st_mtime_ns)
        used_at = np.frombuffer(times, np.int64) if times else np.empty(0, np.int64)
        order = np.argsort(used_at, kind="stable")
        return total, OldEntries(np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)[order], used_at[order])


def _make_own(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(0, "is no folder of this user's own", str(folder))
