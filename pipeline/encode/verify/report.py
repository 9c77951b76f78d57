"""What `lathe verify` found: one line for each check, for a person and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.console import printable

Status = Literal["ok", "warn", "fail"]

_AGAIN = "delete the receipts of these shards, and run `lathe encode` again: they alone are encoded anew"
_FOLD = "run `lathe encode` again, which makes the manifest anew"
REMEDIES = {
    "manifest": _FOLD,
    "receipts": _AGAIN,
    "fingerprint": "delete the shards and receipts of another fingerprint, or encode to a new output",
    "files": _AGAIN,
    "checksums": _AGAIN,
    "blocks": _AGAIN,
    "samples": _AGAIN,
    "finite": _AGAIN,
    "text": _AGAIN,
    "split": _AGAIN,
    "keys": "give each picture its own key in the image shards, or take the doubled ones down with `lathe remove`",
    "statistics": _FOLD,
    "rejects": _FOLD,
    "removed": "run `lathe remove` again, which takes down what is left",
    "leftovers": "if no worker is running: `lathe encode` takes in new shards, drops unfinished ones; delete the rest",
    "autoencoder": "give the autoencoder that the latents were made with: --autoencoder",
    "sources": "give the place of the image shards: --images",
    "pictures": "look at the contact sheet, then encode anew with the autoencoder and preparation of the fingerprint",
}
"""What to do where a check does not hold; the checks stand in the report in this order."""

_SHOWN = 5  # of what is wrong, for a person
_KEPT = 100


class Notes:
    """What does not hold, by check, in words. All of it is counted, the first of each check are kept."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, Status], list[str]] = {}
        self._counts: Counter[tuple[str, Status]] = Counter()

    def add(self, check: str, said: str, status: Status = "fail") -> None:
        """Note one thing that does not hold, or, with `warn`, that may not be meant."""
        self._counts[check, status] += 1
        kept = self._said.setdefault((check, status), [])
        if len(kept) < _KEPT:
            kept.append(printable(said, one_line=True))

    def merge(self, other: Notes) -> None:
        """Take in the notes of a part."""
        self._counts.update(other._counts)
        for place, said in other._said.items():
            kept = self._said.setdefault(place, [])
            kept += said[: _KEPT - len(kept)]

    def check(self, name: str, figure: str, measures: Mapping[str, Any] | None = None) -> Check:
        """The check's line in the report; `figure` tells what was looked at."""
        failed, warned = (self._said.get((name, status), []) for status in ("fail", "warn"))
        count = sum(self._counts[name, status] for status in ("fail", "warn"))
        return Check(
            name=name,
            status="fail" if failed else "warn" if warned else "ok",
            figure=printable(figure, one_line=True),
            problems=count,
            said=(*failed, *warned),
            remedy=REMEDIES[name] if count else "",
            measures=dict(measures or {}),
        )


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    figure: str  # what was looked at
    problems: int
    said: tuple[str, ...]  # the first of them, each with shard, key and figure
    remedy: str
    measures: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person."""
        more = [f"and {self.problems - _SHOWN} more"] if self.problems > _SHOWN else []
        below = [*self.said[:_SHOWN], *more, *([f"-> {self.remedy}"] if self.remedy else [])]
        return [f"{self.status:<5} {self.name:<12} {self.figure}", *(f"{'':<19}{line}" for line in below)]


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one data set."""

    manifest: str
    quick: bool  # the shards were not read through
    seconds: float
    bytes_read: int  # of latent shards
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of the checks."""
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return self.status != "fail"

    def to_json(self) -> str:
        """Every figure, as JSON."""
        told = {**asdict(self), "status": self.status}
        return json.dumps(told, indent=1, allow_nan=False, default=str) + "\n"

    def __str__(self) -> str:
        count = Counter(check.status for check in self.checks)
        last = ", ".join(f"{count[status]} {status}" for status in ("ok", "warn", "fail") if count[status])
        speed = f", {self.bytes_read / 1e6:.0f} MB read in {self.seconds:.1f} s" if self.bytes_read else ""
        quick = "; quick: what is in the shards was not looked at" if self.quick else ""
        lines = [line for check in self.checks for line in check.lines()]
        return "\n".join([*lines, f"{printable(self.manifest, one_line=True)}: {last}{speed}{quick}"])
