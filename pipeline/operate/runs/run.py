"""One run as it is now: its numbers, its run file, what it ran on, its checkpoints and pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DataError
from pipeline.metrics import LOG, LogFollower
from pipeline.operate.runs.credentials import without_credentials
from pipeline.operate.runs.encoded import Encoded
from pipeline.operate.runs.find import MARKER, RUN_FILE, SHEET, STARTS, Found, Listing, list_run
from pipeline.operate.runs.numbers import LARGEST_STEP, Numbers
from pipeline.operate.runs.record import read_or_tell
from pipeline.storage import Entry, local_path

_CHECKPOINT = re.compile(r"(?:checkpoints/)?step-(\d{8,})/(complete\.json|state\.json)")
Progress = Callable[[int, int], None]


@dataclass
class Run:
    """A run that is looked at; `refresh` brings it up to date.

    Args:
        found: where it stands.
        name: what it is called beside other runs.
    """

    found: Found
    name: str
    numbers: Numbers = field(default_factory=Numbers)
    config: dict[str, Any] = field(default_factory=dict)
    with_credentials: dict[str, Any] = field(default_factory=dict)  # the same; to be compared, and never shown
    starts: list[dict[str, Any]] = field(default_factory=list)
    marker: dict[str, Any] = field(default_factory=dict)
    encoded: list[Encoded] = field(default_factory=list)
    entries: Sequence[Entry] = ()
    problems: list[str] = field(default_factory=list)
    _follower: LogFollower | None = None
    _records: dict[str, tuple[str, Any]] = field(default_factory=dict)  # by name, with the version that was read

    def refresh(self, progress: Progress | None = None, listing: Listing | None = None) -> bool:
        """Read what has come since the last call. Returns whether something has.

        Args:
            progress: called with (parts read, parts to read) where that takes long.
            listing: of the output, where it was listed a moment ago.

        Raises:
            StorageError: the output cannot be read. A file of a folder that cannot is one of the `problems`.
        """
        now = list_run(self.found.store, known=True) if listing is None else listing
        self.entries = now.entries
        self.problems = [f"{name} is left out: {why}" for name, why in now.left_out.items()]
        if self.found.kind == "encode":
            return self._refresh_encoded(progress)
        self._refresh_records()  # before the log, which may be long: a checkpoint does not stay for ever
        return LOG not in now.left_out and self._refresh_log(progress)

    @property
    def target(self) -> int | None:
        """Steps after which it is finished, where its run file tells."""
        for steps in (self.config.get("steps", self.marker.get("steps")), self.numbers.last("target_steps")):
            if isinstance(steps, int | float) and 1 <= steps < LARGEST_STEP:
                return int(steps)
        return None

    @property
    def start_steps(self) -> list[int]:
        """Steps that its starts went on from, where they were noted, in order of the starts."""
        found = [start.get("step") for start in self.starts]
        return [step for step in found if isinstance(step, int) and 0 <= step < LARGEST_STEP]

    @property
    def pace(self) -> float | None:
        """Seconds that a step takes since the last start, validations and saves included; None = not known."""
        return self.numbers.pace(self.start_steps[-1] if self.start_steps else -1)

    @property
    def checkpoints(self) -> dict[int, int]:
        """Bytes of each complete checkpoint, by its step, oldest first."""
        steps = sorted({int(m[1]) for e in self.entries if (m := _CHECKPOINT.fullmatch(e.name))})
        sizes = dict.fromkeys(steps, 0)
        for entry in self.entries:
            folder = re.match(r"(?:checkpoints/)?step-(\d{8,})/", entry.name)
            if folder and int(folder[1]) in sizes:
                sizes[int(folder[1])] += entry.size
        return sizes

    @property
    def sheets(self) -> list[tuple[int, Entry]]:
        """Pictures of its prompts, by step."""
        return sorted((int(m[1]), e) for e in self.entries if (m := SHEET.fullmatch(e.name)))

    @property
    def complete(self) -> bool:
        """Whether all of it is stored."""
        if self.found.kind == "encode":
            return bool(self.encoded) and all(part.manifest for part in self.encoded)
        if self.found.kind == "first_stage":
            return bool(self.marker)
        return self.target is not None and any(step >= self.target for step in self.checkpoints)

    def _refresh_log(self, progress: Progress | None) -> bool:
        follower = self._follower = self._follower or LogFollower(self.found.store)
        before = len(self.numbers)
        begun_anew = False
        try:
            begun_anew = follower.changed(self.entries)
            if begun_anew:
                self.numbers = Numbers()
            for line in follower.lines(self.entries, progress):
                self.numbers.add(line)
        except OSError as error:
            self.problems.append(f"{LOG} cannot be read, and is left out: {error.strerror}")
        if follower.damaged:
            self.problems.append(f"damaged lines of its log, left out: {follower.damaged:,}")
        return begun_anew or len(self.numbers) > before

    def _refresh_records(self) -> None:
        """The run file and what else changes rarely: read again where it has changed, kept where it was damaged."""
        versions = {entry.name: entry.version for entry in self.entries}
        newest = f"step-{max(self.checkpoints):08d}/config.yaml" if self.checkpoints else ""
        config = RUN_FILE if RUN_FILE in versions else newest
        self.with_credentials = self._record(config, versions, dict) or self.with_credentials
        if (starts := self._record(STARTS, versions, list)) is not None:
            self.starts = without_credentials([start for start in starts if isinstance(start, dict)])
        if (marker := self._record(MARKER, versions, dict)) is not None:
            self.marker = without_credentials(marker)
            if not self.with_credentials and isinstance(marker.get("settings"), dict):
                self.with_credentials = marker["settings"]
        self.config = without_credentials(self.with_credentials)

    def _record(self, name: str, versions: Mapping[str, str], kind: type) -> Any:
        """What a record says; None where it is not there, damaged, or cannot be read."""
        if name not in versions:
            return None
        if name in self._records and self._records[name][0] == versions[name]:
            return self._records[name][1]
        tree = read_or_tell(self.found.store, name, kind, self.problems)
        if tree is not None:
            self._records[name] = versions[name], tree
        return tree

    def _refresh_encoded(self, progress: Progress | None) -> bool:
        folders = sorted({e.name.split("/")[0] for e in self.entries if re.match(r"\d+/[^/]+\.json", e.name)}, key=int)
        known = {part.folder: part for part in self.encoded}
        self.encoded = [known.get(name) or Encoded(self.found.store, name) for name in folders or [""]]
        changed = [part.read(self.entries, progress) for part in self.encoded]  # each of them
        self.problems += [problem for part in self.encoded for problem in part.problems]
        return any(changed)


def open_runs(found: Sequence[Found]) -> list[Run]:
    """Runs under names that are short and tell them apart. Raises DataError where one is given twice."""
    places = [_place(one.store.url, os.path.realpath) for one in found]
    twice = next((one for one, place in zip(found, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise DataError(f"{twice.address} is given twice", "give each run once")
    names = _names([_place(one.store.url, os.path.abspath) for one in found])
    return [Run(one, name) for one, name in zip(found, names, strict=True)]


def _place(url: str, whole: Callable[[str], str]) -> str:
    """An address that does not hang on where this process stands; `whole` makes such a path."""
    return url.rstrip("/") if "://" in url else whole(str(local_path(url)))


def _names(urls: Sequence[str]) -> list[str]:
    """As many of the last parts of the addresses as it takes."""
    parts = [[part for part in url.split("/") if part] or [url] for url in urls]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)
