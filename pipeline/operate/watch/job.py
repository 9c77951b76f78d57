"""`lathe watch`: the loop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console
from rich.live import Live

from pipeline.console import printable, say
from pipeline.operate.runs.find import find
from pipeline.operate.runs.run import open_runs
from pipeline.operate.runs.state import is_remote
from pipeline.operate.watch.figures import line
from pipeline.operate.watch.keys import Keys
from pipeline.operate.watch.screen import Screen
from pipeline.operate.watch.watched import Watched

PLAIN_SECONDS = 10.0
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
    """
    runs = open_runs([find(address) for address in addresses])
    live = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    watched = [Watched(run, every or (None if live or is_remote(run) else PLAIN_SECONDS)) for run in runs]
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        if live:
            _watch_live(watched)
        else:
            _watch_plainly(watched)
    except KeyboardInterrupt:
        return  # how one leaves
    except BrokenPipeError:  # whoever read has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _frame: FrameType | None) -> None:
    """By way of the terminal's own settings, which are given back."""
    raise SystemExit(128 + number)


def _watch_live(watched: Sequence[Watched]) -> None:
    console = Console()
    with Keys() as keys:
        screen = Screen(watched, keys=keys.there)
        with Live(screen, console=console, auto_refresh=False) as drawn:
            while True:
                for one in watched:
                    screen.news += [f"{time.strftime('%H:%M:%S')} {one.run.name}: {said}" for said in one.look()]
                drawn.refresh()
                if _finished(watched) or keys.wait(_pause(watched)).lower().startswith("q"):
                    return


def _watch_plainly(watched: Sequence[Watched]) -> None:
    told: dict[str, str] = {}
    with Keys() as keys:
        while True:
            for one in watched:
                news = one.look()
                told[one.run.name] = _tell(one, news, told.get(one.run.name))
            if _finished(watched) or keys.wait(_pause(watched)).lower().startswith("q"):
                return


def _tell(one: Watched, news: Sequence[str], before: str | None) -> str:
    """Say what is new of a run, each in a line; returns the line of its figures."""
    name, now = f"{time.strftime('%H:%M:%S')} {one.run.name}", line(one)
    for said in [*news, *([now] if now != before else [])]:
        say(printable(f"{name}: {said}", one_line=True))
    return now


def _finished(watched: Sequence[Watched]) -> bool:
    return all(one.state.word == "finished" for one in watched)


def _pause(watched: Sequence[Watched]) -> float:
    return max(_SHORTEST_SECONDS, min(_REDRAWN_SECONDS, *(one.seconds_left for one in watched)))
