"""Blocks of latent shards kept on a local disk for later epochs, shared by the processes of a machine.

Every epoch reads all the data, each in another order. So what has been kept stays ("fill and hold",
docs/decisions.md): a full cache of half the data serves half of all reads.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from pipeline.data.cache_folder import DIGEST_BYTES, READ, CacheFolder, Ledger, OldEntries
from pipeline.errors import ConfigError

_log = logging.getLogger(__name__)
_NO_FILE = {errno.ELOOP, errno.ENXIO}  # what opening a link or a socket says
_HOUR_NS = 3600 * 10**9
_PAUSE_SECONDS = 60.0
_OLD_AT_ONCE = 1000  # looked at while the ledger is locked


def block_name(shard_sha256: str, offset: int, length: int) -> str:
    """A block's name: hexadecimal, whatever the receipt says. It changes with the shard, so no entry is ever stale.

    Args:
        shard_sha256: of the shard's bytes.
        offset: of the block in the shard, bytes.
        length: of the block, bytes.
    """
    return hashlib.blake2b(f"{offset} {length} {shard_sha256}".encode(), digest_size=DIGEST_BYTES).hexdigest()


class BlockCache:
    """Blocks on a local disk; for any number of threads and processes, which need not know of each other.

    Bytes come back as they are on the disk: whoever gets them checks their checksum, and drops what is wrong. Hence
    writes are not forced to the disk. Reading takes no lock; writing takes the ledger's, but not for the data.

    The limit counts blocks being written too. It is overshot by no more than those that other processes are writing in
    the moment when this one opens the cache; what killed writers had reserved is free again at the next opening. A
    twentieth of the disk, 1 GiB at most, is left free. When full, entries go that nobody has used since this cache was
    opened, the one unused for longest first, as far as they are older than each old entry that was of use since: what
    the run before this kept of the same data stays, what other data left goes. If there is none, the new block is not
    kept. An entry in use is marked once an hour at most, by its time of change.

    Opening lists the folder in a thread (`scan`); until that is done nothing is kept, and a child forked before only
    reads. The folder belongs on a disk of this machine: over NFS neither locks nor times can be relied on.

    Args:
        folder: where; made if need be. Only `lathe-blocks` in it is touched, which other users cannot enter.
        limit_bytes: what may be kept in the folder. Whoever shares it should give the same.

    Raises:
        ConfigError: the folder cannot be made or written to, or `lathe-blocks` in it is a link or another user's.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        if "://" in str(folder) or "\0" in str(folder):
            raise ConfigError(f"loader.cache={folder!r} is no local folder", "name a folder on a disk of this machine")
        try:
            self._folder = CacheFolder(Path(folder))
        except OSError as error:
            raise ConfigError(
                f"loader.cache={folder} cannot be used: {error.filename or folder}: {error.strerror}",
                "name another folder, mend its permissions, or free some disk space",
            ) from error
        self._limit = limit_bytes
        self._opened = self._of_use_since = self._folder.opened
        self._old: OldEntries | None = None
        self._resume_at = 0.0
        self._told: set[str] = set()
        self.scan = threading.Thread(target=self._scan, name="cache-scan", daemon=True)
        self.scan.start()

    def get(self, name: str, length: int) -> bytes | None:
        """The bytes of a block; None: it is not there, or not of that length, and then it is dropped.

        Args:
            name: from `block_name`.
            length: of the block, bytes.
        """
        try:
            file = os.open(self._folder.path(name), READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _NO_FILE:
                self.drop(name)
            else:
                self._tell("cannot be read", error)
            return None
        data = None
        try:
            status = os.fstat(file)
            if status.st_size == length:
                data = _read(file, length)
                self._mark(file, status.st_mtime_ns)
        except OSError as error:
            self._tell("cannot be read", error)
        finally:
            os.close(file)
        if data is None:
            self.drop(name)
        return data

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keep a block, if there is room. A disk that fails is told once, and tried again a minute later.

        Args:
            name: from `block_name`.
            data: the block's bytes, checked.
        """
        path, whole = self._folder.path(name), memoryview(data).cast("B")
        if self._old is None or time.monotonic() < self._resume_at or os.path.lexists(path):
            return
        try:
            self._write(path, whole)
        except OSError as error:
            self._resume_at = time.monotonic() + _PAUSE_SECONDS
            self._tell("cannot be written", error)

    def drop(self, name: str) -> None:
        """Remove an entry whose bytes were wrong, if there is one."""
        path = self._folder.path(name)
        try:
            with self._folder.ledger() as ledger:
                self._folder.remove(path, ledger)
        except OSError as error:
            self._tell("cannot be removed", error)

    def _write(self, path: str, data: memoryview) -> None:
        """Whole or not at all."""
        with self._folder.ledger() as ledger:
            if not self._make_room(len(data), ledger):
                return
            partial, file = self._folder.start(len(data), ledger)
        kept = False
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
            with suppress(FileExistsError):  # another writer was faster
                os.link(partial, path)
                kept = True
        finally:
            os.close(file)
            with suppress(OSError):
                Path(partial).unlink()
            if not kept:
                with self._folder.ledger() as ledger:
                    ledger.used -= len(data)

    def _make_room(self, size: int, ledger: Ledger) -> bool:
        if size > self._limit:
            self._tell(f"may hold {self._limit} bytes, and a block has {size}")
            return False
        lacking, on_disk = ledger.used + size - self._limit, size - self._folder.free_bytes()
        if max(lacking, on_disk) <= self._evict(max(lacking, on_disk), self._of_use_since, ledger):
            return True
        if on_disk > lacking:
            self._tell("has hardly any disk space left")
        return False

    def _evict(self, wanted: int, unused_since: int, ledger: Ledger) -> int:
        """Remove old entries until as many bytes are free; the bytes that were."""
        freed, old = 0, self._old
        for _ in range(_OLD_AT_ONCE):
            if old is None or freed >= wanted or not old.any_before(unused_since):
                break
            name, used_at = old.take()
            path = self._folder.path(name)
            with suppress(FileNotFoundError):
                if os.lstat(path).st_mtime_ns == used_at:
                    freed += self._folder.remove(path, ledger)
        return freed

    def _mark(self, file: int, used_at: int) -> None:
        if used_at < self._opened:
            self._of_use_since = min(self._of_use_since, used_at)
        if used_at < max(self._opened, time.time_ns() - _HOUR_NS):
            with suppress(OSError):  # a disk that has become read-only still serves
                os.utime(file)

    def _scan(self) -> None:
        try:
            with self._folder.ledger() as ledger:
                self._folder.sweep()
                reserved = ledger.reserved
            total, old = self._folder.entries()
            with self._folder.ledger() as ledger:
                ledger.used = total + ledger.reserved - reserved  # those written meanwhile may count twice
            self._old = old
            over = True  # the limit may have been larger
            while over and old.any_before(self._opened):
                with self._folder.ledger() as ledger:
                    over = ledger.used > self._limit
                    self._evict(ledger.used - self._limit, self._opened, ledger)
        except OSError as error:
            self._tell("cannot be listed", error)

    def _tell(self, said: str, error: OSError | None = None) -> None:
        """Warn, once of each kind."""
        if said not in self._told:
            self._told.add(said)
            reason = f" ({error.strerror or error})" if error else ""
            _log.warning("the block cache %s %s%s; going on without it", self._folder.root, said, reason)


def _read(file: int, length: int) -> bytes | None:
    """None: it ends before."""
    parts = []
    while length and (part := os.read(file, length)):
        parts.append(part)
        length -= len(part)
    return None if length else b"".join(parts)  # of one part, join makes no copy
