"""The JSON-lines log of a run: a line for each interval, in a folder or on S3."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.errors import StorageError
from pipeline.metrics.table import Value

LOG = "metrics.jsonl"
"""The log's name in a folder, which can be appended to."""
PARTS = "metrics/"
"""Where the log's parts go on S3, where nothing can be appended to: `metrics/00000001.jsonl`, by first step."""
_RENAMED = {"validation_bound_bits": "validation_bound"}  # in logs of earlier versions


class LogStore(Protocol):
    """The part of `pipeline.storage.Store` that the log needs."""

    @property
    def url(self) -> str: ...  # noqa: D102
    def read(self, name: str) -> bytes: ...  # noqa: D102
    def write(self, name: str, data: bytes) -> bool: ...  # noqa: D102
    def list(self, prefix: str = "") -> Sequence[Any]: ...  # noqa: D102
    def delete(self, names: Iterable[str]) -> None: ...  # noqa: D102


def read_log(store: LogStore) -> list[dict[str, Any]]:
    """The lines of a run's log in order of step. A line that was torn by a kill, or is none of ours, is left out."""
    return [line for name in _log_files(store) for line in _parsed(store.read(name))]


def _parsed(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for text in content.decode(errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # torn; a number of thousands of digits, a million brackets
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append({_RENAMED.get(str(key), str(key)): value for key, value in line.items()})
    return lines


def parsed_line(text: bytes) -> dict[str, Any] | None:
    """One line of a log; None where it is none of ours, or torn."""
    return next(iter(_parsed(text)), None)


def _log_files(store: LogStore) -> list[str]:
    if can_append(store):
        return [LOG] if (Path(store.url) / LOG).exists() else []
    return sorted(e.name for e in store.list(PARTS))


def can_append(store: LogStore) -> bool:
    """Whether the log is one file, and not parts."""
    return "://" not in store.url


def _encode(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def plain(value: Value) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {label: plain(inner) for label, inner in value.items()}
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _starts(files: Iterable[bytes]) -> int:
    """How many starts the lines of a log tell of.

    Args:
        files: of the log, the newest first; older ones are read only while nothing is found.
    """
    found = False
    for lines in map(_parsed, files):
        found |= bool(lines)
        for line in reversed(lines):
            if isinstance(line.get("restarts"), int):
                return int(line["restarts"]) + 1
    return int(found)  # a log from before they were told


class _FolderLog:
    """One file, appended to line by line, so that a reader sees each line at once.

    A line that the disk does not take waits for the next one: `flush` alone raises.
    """

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self._path = Path(store.url) / LOG
        self._file: IO[bytes] | None = None
        self._waiting = b""
        self._lock = threading.Lock()

    def append(self, _step: int, line: str) -> None:
        with self._lock:
            self._waiting += f"{line}\n".encode()
            with suppress(OSError):
                self._write()

    def starts(self) -> int:
        return _starts(self._store.read(name) for name in _log_files(self._store))

    def drop_after(self, step: int) -> None:
        kept = [line for line in read_log(self._store) if line["step"] <= step]
        self._store.write(LOG, _encode(kept))

    def flush(self) -> None:
        with self._lock:
            try:
                self._write()
                if self._file is not None:
                    self._file.close()
            except OSError as error:
                raise StorageError(
                    f"{self._path}: {error.strerror}", "make room or mend the folder's rights"
                ) from error
            self._file = None

    def _write(self) -> None:
        while self._waiting:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            self._waiting = self._waiting[self._file.write(self._waiting) :]  # a disk that fills up takes a part


class _PartsLog:
    """Parts that are written whole: each holds the lines between two checkpoints and bears its first step."""

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self._lines: list[tuple[int, str]] = []
        self._stored: list[tuple[int, str]] = []  # the last part

    def append(self, step: int, line: str) -> None:
        self._lines.append((step, line))

    def starts(self) -> int:
        return _starts(self._store.read(name) for name in reversed(_log_files(self._store)))

    def drop_after(self, step: int) -> None:
        for name in reversed(_log_files(self._store)):
            lines = _parsed(self._store.read(name))
            kept = [line for line in lines if line["step"] <= step]
            self._stored = [(line["step"], json.dumps(line)) for line in kept]
            if len(kept) == len(lines):
                break
            if kept:
                self._store.write(name, _encode(kept))
            else:
                self._store.delete([name])

    def flush(self) -> None:
        lines = list(self._lines)
        if lines:
            first = lines[0][0]
            # a step may have several lines, and be flushed between them
            part = [*self._stored, *lines] if self._stored and self._stored[0][0] == first else lines
            self._store.write(f"{PARTS}{first:08d}.jsonl", "".join(f"{line}\n" for _, line in part).encode())
            self._stored = part
            del self._lines[: len(lines)]  # others were appended meanwhile


def open_log(store: LogStore) -> _FolderLog | _PartsLog:
    """The log to be appended to. Its methods raise StorageError."""
    return _FolderLog(store) if can_append(store) else _PartsLog(store)
