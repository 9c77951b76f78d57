"""What a person sees in the terminal: one progress line per job, live on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0


def tell(text: str) -> None:
    """Lines for a person, beside the progress."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def table(facts: Mapping[str, str]) -> str:
    """Names and values, one pair a line."""
    return "\n".join(f"  {name:<12}{value}" for name, value in facts.items())


class ProgressLine:
    """One job's progress: `update(done, total, note)` as often as wanted.

    On a terminal a bar with elapsed and remaining time; elsewhere one plain line every 15 s and one at the end.

    Args:
        name: what is going on, such as "encode".
        unit: what is counted, such as "shards".
    """

    def __init__(self, name: str, unit: str, *, visible: bool = True) -> None:
        self._name, self._unit, self._visible = name, unit, visible
        self._started = self._last_line = time.monotonic()
        self._done, self._total, self._note = 0, 0, ""
        self._bar: Progress | None = None
        if visible and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=None, unit=unit, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None and self._total:
            self._print()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done; `note` is a few words such as the loss."""
        self._done, self._total, self._note = done, total, note
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print()

    def _print(self) -> None:
        if self._visible:
            seconds = time.monotonic() - self._started
            line = f"{self._name}: {self._done}/{self._total} {self._unit} after {seconds:.0f} s  {self._note}"
            tell(line.rstrip())
