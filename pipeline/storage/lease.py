"""One writer for an output: a file that its holder writes anew every few seconds, for others to see that it lives.

No clocks are compared. A holder on the same machine is looked up by its process id and the time that it started; of
one on another machine, the others watch whether the file changes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import LatheError, StorageError
from pipeline.storage.base import Store

LEASE = "lease.json"
RENEWED_SECONDS = 3.0
WATCHED_SECONDS = 12.0  # of a holder elsewhere that may be gone
_LOOK_SECONDS = 1.0
_SHORT_SECONDS, _MOST_UNREAD = 0.1, 10
_LEAVE_SECONDS = 5.0  # for a store that is slow, or away
_GONE_STATES = ("X", "Z")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, as another process sees it."""

    host: str
    pid: int
    lives: bool | None  # None = on another machine or in another container: only watching the counter tells
    counter: int  # moves every few seconds while it lives

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def holder(store: Store) -> Holder | None:
    """Who holds a store's lease, without taking it; None where nobody does. Raises StorageError."""
    if not store.exists(LEASE):
        return None
    found = _parsed(store.read(LEASE))
    is_here = all(found.get(name) == value for name, value in _place().items())
    started = _started(found.get("pid", 0)) if is_here else None
    lives = started is not None and started == found.get("started") if is_here else None
    pid, counter = (found.get(name) for name in ("pid", "counter"))
    return Holder(
        str(found.get("host", "an unknown host")),
        pid if isinstance(pid, int) else 0,
        lives,
        counter if isinstance(counter, int) else 0,
    )


class LostLeaseError(LatheError):
    """The output belongs to another process by now."""


class Lease:
    """The right to write to a store, for as long as this process lives and renews it.

    Args:
        store: what is written to.
        say: told where taking it needs patience.
    """

    def __init__(self, store: Store, say: Callable[[str], object] = lambda text: None) -> None:
        self._store, self._say = store, say
        own = os.getpid()
        self._content: dict[str, Any] = {
            "id": secrets.token_hex(16),
            **_place(),
            "pid": own,
            "started": _started(own),
            "counter": 0,
        }
        self.lost: LostLeaseError | None = None
        """What `check` would raise, once the renewal has found it out."""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lathe-lease", daemon=True)

    def take(self) -> None:
        """Take it, from a holder that is gone if need be, and renew it from now on.

        Raises:
            LatheError: another process holds it.
            StorageError: it cannot be read or written.
        """
        unread = 0
        while not self._store.write(LEASE, self._bytes(), if_absent=True):
            theirs = self._read()
            if theirs is None:  # given back meanwhile, if it is a file at all
                unread += 1
                if unread == _MOST_UNREAD:
                    raise StorageError(
                        f"{self._store.url}/{LEASE} is in the way, and no file", "delete it, or choose another output"
                    )
                time.sleep(_SHORT_SECONDS)
                continue
            if self._outlives(theirs):
                self._store.write(LEASE, self._bytes())
                time.sleep(_LOOK_SECONDS)  # of several that take it over, the last to write has it
                now = self._read()
                if now is not None and not self._is_mine(now):
                    raise self._refused(now)
                break
        self._renewing.start()

    def check(self) -> None:
        """Ask the store whether it is still this process's; after `release` it is not.

        Raises:
            LostLeaseError: it is not.
            StorageError: the store does not tell.
        """
        with self._lock:
            now = self._read()
            if now is None and not self._ended.is_set():
                now = self._bytes()
                if not self._store.write(LEASE, now, if_absent=True):
                    now = self._read()
        if now is None or not self._is_mine(now):
            raise LostLeaseError(
                f"{self._store.url} was taken over by {_who(_parsed(now or b''))} while this run seemed to be gone",
                "stop one of the two; what that one saves is whole, and this one saves no more",
            )

    def release(self) -> None:
        """Give it back, if it is held; a store that fails keeps it, and the next process takes it over."""
        self._ended.set()
        if self._renewing.is_alive():
            self._renewing.join(_LEAVE_SECONDS)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_SECONDS):
            try:
                self.check()
                with self._lock:
                    self._content["counter"] += 1
                    self._store.write(LEASE, self._bytes())
            except LostLeaseError as error:
                self.lost = error
                return
            except StorageError:
                continue  # the store is away
        with suppress(StorageError):
            now = self._read()
            if now is not None and self._is_mine(now):
                self._store.delete([LEASE])

    def _outlives(self, theirs: bytes) -> bool:
        """Whether the holder is gone. Raises LatheError where it lives."""
        holder = _parsed(theirs)
        if all(holder.get(name) == value for name, value in _place().items()):
            started = _started(holder.get("pid", 0))
            if started is not None and started == holder.get("started"):
                raise self._refused(theirs)
            return True
        self._say(f"{self._store.url} may be in use by {_who(holder)}: watching its lease for {WATCHED_SECONDS:.0f} s")
        deadline = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            now = self._read()
            if now is None:
                return True
            if now != theirs:
                raise self._refused(now)
        return True

    def _refused(self, theirs: bytes) -> LatheError:
        holder = _parsed(theirs)
        return LatheError(
            f"{self._store.url} is being written to by {_who(holder)}",
            "wait for that run or stop it, or choose another output",
        )

    def _read(self) -> bytes | None:
        try:
            return self._store.read(LEASE)
        except StorageError:
            if self._store.exists(LEASE):
                raise
            return None

    def _bytes(self) -> bytes:
        return (json.dumps(self._content) + "\n").encode()

    def _is_mine(self, content: bytes) -> bool:
        return bool(_parsed(content).get("id") == self._content["id"])


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _place() -> dict[str, str]:
    """Where a process id means something: the machine since its last start, and there the container."""
    found = {"host": socket.gethostname(), "boot": "", "container": ""}
    try:
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        found["container"] = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        found["boot"] = found["boot"] or f"{psutil.boot_time():.0f}"
    return found


def _started(pid: int) -> float | None:
    """When a process started, by a clock that nobody sets; None where there is no such process."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError, TypeError, OverflowError):
        text = ""
    if text:
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in _GONE_STATES else float(fields[19])  # proc(5): state, starttime
    if Path("/proc/self/stat").exists():
        return None
    try:
        return psutil.Process(int(pid)).create_time()
    except (psutil.Error, ValueError, TypeError, OverflowError):
        return None
