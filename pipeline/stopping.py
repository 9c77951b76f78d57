"""Signals that ask to stop end a command promptly, whatever it is at: a silent server, a long call of a library."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.console import tell

GRACE_SECONDS = 1.5
SAID = "stopped; the same command goes on where it was"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SHOW_CURSOR = "\x1b[?25h"  # a live progress bar hides it
_to_do: list[Callable[[], None]] = []
_entered: list[PromptStop] = []


def when_stopped(do: Callable[[], None]) -> Callable[[], None]:
    """Have something done as soon as `PromptStop` is asked to stop, in a thread of its own: nobody waits for it.

    Returns:
        takes that back.
    """
    _to_do.append(do)

    def forget() -> None:
        with suppress(ValueError):
            _to_do.remove(do)

    return forget


def not_ignored(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Without SIGHUP where it is ignored: whoever had that done wants the process to outlive its terminal."""
    return [s for s in signals if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def give_way() -> None:
    """No signal ends this process promptly any more, whoever has entered `PromptStop`: there is something to save."""
    while _entered:
        _entered.pop()._leave()


class Stopped(KeyboardInterrupt):
    """The process was asked to stop.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class PromptStop:
    """While it is entered, signals that ask to stop raise `Stopped`, and leaving it by that tells so in one line.

    They are SIGINT, SIGTERM, SIGHUP, which stays ignored where it was, as by nohup, and what schedulers send ahead of a
    limit, SIGUSR1 and SIGUSR2.

    A process that has not ended a moment later is ended, as `kill -9` would: only for work that survives that; what
    others must be told of the end, `when_stopped` sees to. Further signals change nothing, since launchers send them
    twice. For the main thread; in others it does nothing.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self._grace_seconds = grace_seconds
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None
        self._telling = threading.Lock()
        self._signalled = False
        self._others_told = threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            # Python calls handlers between two of the main thread's steps; the byte arrives while a step takes long.
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._stop) for number in not_ignored(_SIGNALS)}
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="stopping", daemon=True).start()
            _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._signalled:
            for each in _SIGNALS:  # a handler of ours would go before the interpreter does
                signal.signal(each, signal.SIG_IGN)
        if isinstance(error, Stopped):
            self._others_told.wait(self._grace_seconds)
            self._tell()
        self._leave()

    def _leave(self) -> None:
        if self in _entered:
            _entered.remove(self)
        if self._pipe is not None and not self._signalled:  # else it is watched until it ends
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._pipe[1])  # ends the watch
            self._pipe = None

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._signalled = True
        for each in _SIGNALS:  # Python reports one that has come already, and is to be ignored from now on
            signal.signal(each, _do_nothing)
        raise Stopped(number)

    def _watch(self, signals: int) -> None:
        while number := os.read(signals, 1):
            if number[0] in _SIGNALS:
                with suppress(RuntimeError):  # no thread is to be had
                    threading.Thread(target=self._tell_others, name="stopped", daemon=True).start()
                time.sleep(self._grace_seconds)
                self._tell()
                os._exit(128 + number[0])
        os.close(signals)

    def _tell_others(self) -> None:
        _do_all()
        self._others_told.set()

    def _tell(self) -> None:
        """Once, by whoever comes first; it is not let go of again."""
        if self._telling.acquire(blocking=False):
            with suppress(OSError):  # whoever watched may have gone
                tell(f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}{SAID}")


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _do_all() -> None:
    for do in list(_to_do):
        with suppress(Exception):
            do()
