"""What the stages of a submission have said, and go on to say."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.console import say
from pipeline.errors import StorageError

_TAIL_BYTES = 1 << 20
_POLL_SECONDS = 0.5
_STATE_SECONDS = 5.0


class Follower:
    """Shows whole lines of files that grow, each once; of several files, with the file's name before it.

    Args:
        files: those that are there at the moment, by name.
        from_end: what they hold already is left out.
    """

    def __init__(self, files: Callable[[], Mapping[str, Path]], *, from_end: bool = False) -> None:
        self._files = files
        self._places: dict[Path, int] = {}
        self._rests: dict[Path, bytes] = {}
        if from_end:
            self._places = {path: path.stat().st_size for path in files().values()}

    def show(self, *, last: bool = False) -> None:
        """Print the lines that have come; at the last also one that has no end."""
        for name, path in self._files().items():
            lines = self._lines(path)
            if last and (rest := self._rests.pop(path, b"")):
                lines.append(_text(rest))
            for line in lines:
                say(f"[{name}] {line}" if name else line)

    def begin_at(self, path: Path, place: int) -> None:
        """Leave out what a file holds before a byte."""
        self._places[path] = place

    def _lines(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                place = self._places.get(path, 0)
                if place > os.fstat(file.fileno()).st_size:  # begun anew
                    place, self._rests[path] = 0, b""
                file.seek(place)
                new = file.read()
        except OSError:  # deleted, or away; it may be read the next time
            return []
        self._places[path] = place + len(new)
        *lines, self._rests[path] = (self._rests.get(path, b"") + new).split(b"\n")
        return [_text(line) for line in lines]


def show(files: Callable[[], Mapping[str, Path]], lines: int, is_over: Callable[[], bool] | None = None) -> None:
    """Print the last lines of each file, and if `is_over` is given, what comes until then.

    Args:
        files: those that are there at the moment, by name; more may come.
        lines: of each, to begin with.
        is_over: asked every few seconds, in a thread: a scheduler that is away takes minutes to say nothing.

    Raises:
        StorageError: a file cannot be read.
    """
    follower = Follower(files)
    for path in files().values():
        follower.begin_at(path, _last_lines(path, lines))
    if is_over is not None:
        over = threading.Event()
        threading.Thread(target=_ask, args=(is_over, over), name="state", daemon=True).start()
        follower.show()
        while not over.wait(_POLL_SECONDS):
            follower.show()
    follower.show(last=True)


def _ask(is_over: Callable[[], bool], over: threading.Event) -> None:
    try:
        while not is_over():
            time.sleep(_STATE_SECONDS)
    finally:
        over.set()


def ending(path: Path, count: int = 1) -> list[str]:
    """The last lines of a log that are not empty; none where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            said = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in said.splitlines() if line.strip()][-count:]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")


def _last_lines(path: Path, count: int) -> int:
    """Where the last so many lines begin, within the last mebibyte."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = max(0, size - _TAIL_BYTES)
            file.seek(begin)
            tail = file.read()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}", "mend its permissions") from error
    place = len(tail) - tail.endswith(b"\n")
    for _ in range(count):
        found = tail.rfind(b"\n", 0, max(0, place))
        if found < 0:
            return begin
        place = found
    return min(size, begin + place + 1)
