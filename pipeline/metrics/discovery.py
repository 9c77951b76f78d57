"""Files by which Prometheus finds the processes of a run: one each, in a folder that both can see.

Their format is that of Prometheus's `file_sd_configs`. Labels that begin with `__` never reach a series.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import tell
from pipeline.metrics.place import Place
from pipeline.metrics.table import Job

LOOK_SECONDS = 10.0
"""So often a process looks whether the folder is there."""
ANSWER_SECONDS = 5.0
"""So long a job waits at its start, and at its end, for a folder that may be on a network which is away."""
LAST_ANSWER_SECONDS = 0.5
"""The same of a process that is being ended."""
_OWNER = "__lathe_output"
_LONGEST_FILE = 1 << 16
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class Announcement:
    """This process's file. That it cannot be written is told once, and is no error: it is tried again.

    So it is where the folder is deleted, or is another one. A file that somebody has deleted from it stays away.

    Args:
        folder: for such files; made where it is missing.
        job: what the process does.
        place: which one it is.
        labels: of its target.
        targets: HOST:PORT of each address that the process answers at; Prometheus is told the first.
    """

    def __init__(
        self, folder: str, *, job: Job, place: Place, labels: Mapping[str, str], targets: Sequence[str]
    ) -> None:
        self._folder, self._place, self._owner = Path(folder), place, place.owner
        self._host, self._targets = labels["host"], targets
        self._ranks = job != "encode"  # whose workers come and go by themselves
        told = {**labels, _OWNER: place.owner}
        self._content = json.dumps([{"targets": [targets[0]], "labels": told}], indent=1) + "\n"
        self._stem = f"lathe-{job}-{_NOT_IN_NAMES.sub('_', labels['run'])}"
        self._path = self._folder / f"{self._stem}-{place.number}.json"
        self._written_to: tuple[int, int] | None = None  # the folder, as the system knows it; None = to none
        self._is_told = False  # that there is none
        self._started = self._stays = False
        self._ended, self._at_work, self._done = threading.Event(), threading.Event(), threading.Event()

    def start(self) -> None:
        """Write the file, and see to it until `close`."""
        if self._ended.is_set():
            return
        self._started = True
        threading.Thread(target=self._run, name="metrics-discovery", daemon=True).start()
        if not self._at_work.wait(ANSWER_SECONDS):
            tell(f"metrics: {self._folder} does not answer: Prometheus is told of this process there once it does")

    def close(self, *, failed: bool = False, stopped: bool = False) -> None:
        """Remove the file, unless a later start has taken its place.

        Args:
            failed: it stays, for who looks for the cause.
            stopped: the process has no time to wait.
        """
        if not self._ended.is_set():
            self._stays = failed
            self._ended.set()
        if self._started and not self._done.wait(LAST_ANSWER_SECONDS if stopped else ANSWER_SECONDS):
            tell(f"metrics: {self._folder} does not answer: {self._path.name} may stay there")

    def _run(self) -> None:
        """All that is done to the folder: whoever waits for that thread does so for a while alone."""
        try:
            if not self._ended.is_set():
                self._announce()
                self._at_work.set()
                while not self._ended.wait(LOOK_SECONDS):
                    self._keep()
                self._withdraw()
        finally:
            self._at_work.set()
            self._done.set()

    def _keep(self) -> None:
        """Have the file in the folder, whatever became of that."""
        found = _identity(self._folder)
        if found is not None and found == self._written_to:
            return
        if found is not None and _content(self._path) == self._content:
            self._written_to = found  # it was mounted anew
        elif self._announce():
            tell(f"metrics: {self._folder} was not to be had; Prometheus is told of this process there now")

    def _withdraw(self) -> None:
        with suppress(OSError):
            if not self._stays and _content(self._path) == self._content:
                self._path.unlink()

    def _announce(self) -> bool:
        """Whether the file could be written; the first time in a row that it could not is told."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            stem = self._take_name()
            self._write()
            self._clear(stem)
            self._written_to, self._is_told = _identity(self._folder), False
        except OSError as error:
            if not self._is_told:
                tell(f"metrics: {self._folder}: {error.strerror}: Prometheus is not told of this process there")
            self._written_to, self._is_told = None, True
        return not self._is_told

    def _take_name(self) -> str:
        """The file's, which no other run of this name has. Returns what it has in common with those of other ranks."""
        number, longer = self._place.number, f"{self._stem}-{self._place.digest}"
        short, long = (self._folder / f"{stem}-{number}.json" for stem in (self._stem, longer))
        if not self._is_of_another_run(short):
            long.unlink(missing_ok=True)  # of a killed start that met another run here
            self._path = short
            return self._stem
        if self._path != long:
            tell(f"metrics: {short} is of another run of this name: ours is {long.name}; set metrics.run")
        self._path = long
        return longer

    def _is_of_another_run(self, path: Path) -> bool:
        known = _known(path)
        return known is not None and known.owner != self._owner

    def _write(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self._content, encoding="utf-8")
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _clear(self, stem: str) -> None:
        """Drop what killed processes left: of this run where it had more, of others at our addresses of this machine.

        Nobody takes the place of the former, and our numbers would pass for those of the latter.
        """
        for path in self._folder.glob("lathe-*.json"):
            number = path.stem.removeprefix(f"{stem}-")
            is_of_this_run = number.isdecimal()
            is_beyond = is_of_this_run and self._place.number == 0 and int(number) >= self._place.count
            if path == self._path or (is_of_this_run and self._ranks and not is_beyond):
                continue  # ranks start together, and write theirs anew: of thousands each would read all
            known = _known(path)
            if known is None:
                continue
            is_at_our_address = known.host == self._host and known.target in self._targets
            if is_at_our_address or (is_beyond and known.owner == self._owner):
                path.unlink(missing_ok=True)


class _Known(NamedTuple):
    """What a file says."""

    owner: str  # the output of the run that wrote it
    host: str
    target: str


def _content(path: Path) -> str | None:
    """None where it is no regular file, or too large to be one of these: a folder that many see may hold anything."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(_LONGEST_FILE + 1)
            return content.decode(errors="replace") if len(content) <= _LONGEST_FILE else None
    return None


def _identity(folder: Path) -> tuple[int, int] | None:
    """None where there is none."""
    with suppress(OSError):
        found = folder.stat()
        return found.st_dev, found.st_ino
    return None


def _known(path: Path) -> _Known | None:
    """None where there is none, or it is no such file."""
    try:
        found: Any = json.loads(_content(path) or "")
        labels = found[0]["labels"]
        return _Known(str(labels[_OWNER]), str(labels["host"]), str(found[0]["targets"][0]))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
