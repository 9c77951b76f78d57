"""Files by which Prometheus finds the processes of a run: one each, in a folder that both can see.

Their format is that of Prometheus's `file_sd_configs`. Labels that begin with `__` never reach a series.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import tell
from pipeline.metrics.place import Place
from pipeline.metrics.table import Job

_OWNER = "__lathe_output"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")


class Announcement:
    """This process's file. That it cannot be written is told, and is no error.

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
        self._folder, self._owner = Path(folder), place.owner
        told = {**labels, _OWNER: place.owner}
        self._content = json.dumps([{"targets": [targets[0]], "labels": told}], indent=1) + "\n"
        stem = f"lathe-{job}-{_NOT_IN_NAMES.sub('_', labels['run'])}"
        self._path = self._folder / f"{stem}-{place.number}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._is_of_another_run(self._path):
                other, stem = self._path, f"{stem}-{place.digest}"
                self._path = self._folder / f"{stem}-{place.number}.json"
                tell(f"metrics: {other} is of another run of this name: ours is {self._path.name}; set metrics.run")
            else:  # of a killed start that met another run here
                (self._folder / f"{stem}-{place.digest}-{place.number}.json").unlink(missing_ok=True)
            self._write()
            if place.number == 0:
                self._clear(stem, place.count)
            self._clear_targets(targets, labels["host"])
        except OSError as error:
            tell(f"metrics: {folder}: {error.strerror}: Prometheus is not told of this process there")

    def withdraw(self) -> None:
        """Remove the file, unless a later start has taken its place."""
        with suppress(OSError):
            if self._path.read_text(encoding="utf-8") == self._content:
                self._path.unlink()

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

    def _clear(self, stem: str, count: int) -> None:
        """Drop what a killed start with more processes left: nobody takes their place."""
        for path in self._folder.glob(f"{stem}-*.json"):
            number = path.stem.removeprefix(f"{stem}-")
            known = _known(path)
            if number.isdecimal() and int(number) >= count and known is not None and known.owner == self._owner:
                path.unlink(missing_ok=True)

    def _clear_targets(self, targets: Sequence[str], host: str) -> None:
        """Drop what killed processes of this machine left at our addresses: our numbers would pass for theirs."""
        for path in self._folder.glob("lathe-*.json"):
            known = _known(path)
            if path != self._path and known is not None and known.host == host and known.target in targets:
                path.unlink(missing_ok=True)


class _Known(NamedTuple):
    """What a file says."""

    owner: str  # the output of the run that wrote it
    host: str
    target: str


def _known(path: Path) -> _Known | None:
    """None where there is none, or it is no such file."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        labels = found[0]["labels"]
        return _Known(str(labels[_OWNER]), str(labels["host"]), str(found[0]["targets"][0]))
    except (OSError, ValueError, LookupError, TypeError):
        return None
