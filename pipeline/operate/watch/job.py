"""`lathe watch`: the loop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live

from pipeline.console import forget_output, output, printable, say
from pipeline.operate.runs.find import find
from pipeline.operate.runs.run import open_runs
from pipeline.operate.runs.state import is_remote
from pipeline.operate.watch.keys import Keys
from pipeline.operate.watch.screen import Screen
from pipeline.operate.watch.watched import Watched, line

PLAIN_SECONDS = 10.0
_ENDING = ("HUP", "QUIT", "ABRT", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "TERM")  # who sends one ends us
_REDRAWN_SECONDS = 1.0
_SHORTEST_SECONDS = 0.05


def watch(addresses: Sequence[str], every: float | None = None) -> None:
    """Tell how runs go on, until all have finished or a person leaves: live on a terminal, else a line now and then.

    Args:
        addresses: outputs of `lathe train`, `train-vae` or `encode`.
        every: seconds between two looks; None = 2 on a terminal, 10 elsewhere, 30 for what is on S3.

    Raises:
        DataError: an address holds no run.
        StorageError: a run cannot be read at the start.
        SetupError: standard output takes nothing.
    """
    runs = open_runs([find(address) for address in addresses])
    live = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    watched = [Watched(run, every or (None if live or is_remote(run) else PLAIN_SECONDS)) for run in runs]
    numbers = [signal.Signals[f"SIG{name}"] for name in _ENDING]
    before = {number: signal.signal(number, _leave) for number in numbers if _is_heard(number)}
    try:
        with Suspension() as suspension, output():
            (_watch_live if live else _watch_plainly)(watched, suspension)
    except KeyboardInterrupt:
        return  # how one leaves
    except BrokenPipeError:  # whoever read has left
        forget_output()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heard(number: int) -> bool:
    """Not where whoever started this wants it ignored, as a script does for what it puts in the background."""
    return signal.getsignal(number) != signal.SIG_IGN


def _leave(number: int, _frame: FrameType | None) -> None:
    """By way of the terminal's own settings, which are given back."""
    raise SystemExit(128 + number)


class Suspension:
    """Ctrl-Z, which may come at any time, and is followed once the terminal is as it was found."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if _is_heard(signal.SIGTSTP):
            self._before = signal.signal(signal.SIGTSTP, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTSTP, self._before)

    def follow(self) -> None:
        """Stop, as any program does; this returns when it is told to go on."""
        self.asked = False
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, ours)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _watch_live(watched: Sequence[Watched], suspension: Suspension) -> None:
    console, screen = Console(), Screen(watched, keys=False)
    while True:
        with Keys() as keys:
            screen.keys = keys.there
            with Live(screen, console=console, auto_refresh=False) as drawn:
                while not suspension.asked:
                    for one in watched:
                        screen.news += [f"{time.strftime('%H:%M:%S')} {one.run.name}: {said}" for said in one.look()]
                    drawn.refresh()
                    if _is_over(watched, keys):
                        return
        suspension.follow()


def _watch_plainly(watched: Sequence[Watched], suspension: Suspension) -> None:
    told: dict[str, str] = {}
    while True:
        with Keys() as keys:
            while not suspension.asked:
                for one in watched:
                    news = one.look()
                    told[one.run.name] = _tell(one, news, told.get(one.run.name))
                if _is_over(watched, keys):
                    return
        suspension.follow()


def _tell(one: Watched, news: Sequence[str], before: str | None) -> str:
    """Say what is new of a run, each in a line; returns the line of its figures."""
    name, now = f"{time.strftime('%H:%M:%S')} {one.run.name}", line(one)
    for said in [*news, *([now] if now != before else [])]:
        say(printable(f"{name}: {said}", one_line=True))
    return now


def _is_over(watched: Sequence[Watched], keys: Keys) -> bool:
    """After a pause: whether all have finished, or a person leaves."""
    if all(one.state.word == "finished" for one in watched):
        return True
    pause = min(_REDRAWN_SECONDS, *(one.seconds_left for one in watched))
    return keys.wait(max(_SHORTEST_SECONDS, pause)).lower().startswith("q")
