"""What a person sees in the terminal: one progress line per job, live on a terminal, plain lines in a log; figures."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from pipeline.errors import SetupError

PLAIN_LINE_SECONDS = 15.0
_WIDEST_BAR = 40
_BESIDE_THE_BAR = 60  # columns that name, counts and times take
_COUNT_WIDTH, _LEFT_WIDTH = 8, 11
_ROWS_BELOW_A_HEADER = 20
# Control characters, line ends that are not ours, reversed writing, and halves of characters, which cannot be printed.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# `//user:pass@`, whatever is in the password, but `//host:port/`; without a colon only where no path has begun
_LOGIN = re.compile(r"""(?<=://)(?!\[)(?:[^\s"<>/]*:(?!\d{1,5}/)[^\s"<>]*@|[^\s"<>/]*@)""")
_QUERY = re.compile(r"""(https?://[^\s?'"<>]*)\?[^\s'"<>]*""")


def tell(text: str) -> None:
    """Lines for a person, beside the progress."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or its disk is full: no reason to end a job
        print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def say(result: object) -> None:
    """What a command was asked for, on standard output. Raises SetupError where that takes nothing."""
    with output():
        print(printable(str(result)), flush=True)  # noqa: T201


@contextmanager
def output() -> Iterator[None]:
    """While something is written to standard output, and nothing else may fail by OSError.

    Raises:
        SetupError: it is closed, or on a disk that is full.
        BrokenPipeError: whoever read has left.
    """
    remedy = "send it elsewhere, or make room where it goes"
    if sys.stdout is None:
        raise SetupError("standard output is closed", remedy)
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_output()
        raise SetupError(f"standard output takes nothing: {error.strerror}", remedy) from error


def flush() -> None:
    """Before a process leaves at once: what was printed, as far as it is taken. An exit code says more than that."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()


def forget_output() -> None:
    """What waits to be written, and all that will be, goes nowhere: at the end nothing complains about it again."""
    if sys.stdout is None:
        return
    with suppress(OSError, ValueError):  # it has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def printable(text: str, *, one_line: bool = False) -> str:
    r"""Text in which names of files and other people's words cannot command the terminal, as `\x1b[31m` would.

    Args:
        text: what is to be printed; its line ends stay, and its tabs.
        one_line: line ends and tabs are escaped too, so that no part of the text passes for a line of ours.
    """
    text = _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return text.replace("\n", "\\n").replace("\t", "\\t") if one_line else text


def without_logins(text: str) -> str:
    """Text whose addresses have lost users and passwords, and over HTTP their queries, which may hold tokens."""
    return _QUERY.sub(r"\1", _LOGIN.sub("***@", text))


def table(facts: Mapping[str, str]) -> str:
    """Names and values, one pair a line."""
    return "\n".join(f"  {name:<12}{value}" for name, value in facts.items())


def duration(seconds: float) -> str:
    """About how long, in the two largest units: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class ProgressLine:
    """One job's progress: `update(done, total, note)` as often as wanted, from any thread.

    On a terminal a bar with elapsed and remaining time, and the note below it; elsewhere one plain line every 15 s and
    one at the end.

    Args:
        name: what is going on, such as "encode".
        unit: what is counted, such as "shards".
    """

    def __init__(self, name: str, unit: str, *, visible: bool = True) -> None:
        self._name, self._unit, self._visible = name, unit, visible
        self._started = self._last_line = time.monotonic()
        self._done, self._total, self._note = 0.0, 0, ""
        self._eta_seconds: float | None = None
        self._printed: tuple[float, int, str] | None = None
        self._bar: Progress | None = None
        if visible and sys.stderr is not None and sys.stderr.isatty():
            console = Console(stderr=True)
            self._bar = _NotedProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=max(5, min(_WIDEST_BAR, console.width - _BESIDE_THE_BAR))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                _Remaining(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=None, unit=unit, note="", eta_seconds=None)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.update(self._task, visible=self._bar.tasks[self._task].total is not None)  # moved at all
            self._bar.stop()
        elif kind is None and self._total and self._printed != (self._done, self._total, self._note):
            self._print()

    def update(self, done: float, total: int, note: str = "", eta_seconds: float | None = None) -> None:
        """Show how far the job is.

        Args:
            done: of `total`; a fraction moves the bar, and is not told as a number.
            note: a few words, such as the loss.
            eta_seconds: what is left; None = as the bar's own pace has it, on a terminal.
        """
        note = printable(note, one_line=True)
        self._done, self._total, self._note, self._eta_seconds = done, total, note, eta_seconds
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note, eta_seconds=eta_seconds)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print()

    def _print(self) -> None:
        self._printed = (self._done, self._total, self._note)
        if self._visible:
            done, total, seconds = int(self._done), self._total, time.monotonic() - self._started
            left = f", {duration(self._eta_seconds)} left" if self._eta_seconds and done < total else ""
            line = f"{self._name}: {done}/{total} {self._unit} after {duration(seconds)}{left}  {self._note}"
            tell(line.rstrip())


class ProgressTable(ProgressLine):
    """A progress line with figures now and then: on a terminal a row of a table above the bar, in a log part of a line.

    Args:
        name: what is going on, such as "train".
        unit: what is counted, such as "steps".
        columns: names of the figures and how wide they are; what is done stands before them, and what is left after.
    """

    def __init__(self, name: str, unit: str, columns: Mapping[str, int], *, visible: bool = True) -> None:
        super().__init__(name, unit, visible=visible)
        self._widths = {unit: _COUNT_WIDTH, **columns, "left": _LEFT_WIDTH}
        self._rows = 0

    def move(self, done: int, total: int) -> None:
        """Move the bar, and say nothing."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)

    def row(self, done: int, total: int, figures: Mapping[str, str], eta_seconds: float | None = None) -> None:
        """Show some figures.

        Args:
            done: of `total`.
            total: to be done.
            figures: by column.
            eta_seconds: what is left; None = it is not known.
        """
        if not self._bar:
            told = "  ".join(f"{name} {figure}" for name, figure in figures.items())
            self.update(done, total, told, eta_seconds)
            return
        if self._rows % _ROWS_BELOW_A_HEADER == 0:
            self._draw({name: name for name in self._widths}, "bold")
        left = duration(eta_seconds) if eta_seconds is not None and done < total else ""
        self._draw({self._unit: str(done), **figures, "left": left}, "")
        self._rows += 1
        self.move(done, total)

    def _draw(self, cells: Mapping[str, str], style: str) -> None:
        line = "  ".join(cells.get(name, "").rjust(width) for name, width in self._widths.items())
        if self._bar:
            self._bar.console.print(Text(line, style=style, no_wrap=True, overflow="ellipsis"))


class _NotedProgress(Progress):
    """The note stands below the bar: beside it, a terminal of 80 columns would cut it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", style="dim", no_wrap=True, overflow="ellipsis")


class _Remaining(ProgressColumn):
    """What is left, as the job tells it, else as the bar's pace has it."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        told = task.fields["eta_seconds"]
        seconds = task.time_remaining if told is None else told
        if task.finished or seconds is None:
            return Text("")
        return Text(f"{duration(seconds)} left", style="progress.remaining")
