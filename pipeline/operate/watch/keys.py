"""Single keys from a terminal, which is left as it was found."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class Keys:
    """The keyboard, where input and output are a terminal; elsewhere nothing is ever pressed.

    Where the output goes to another program, as a pager, keys are for that one.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        with suppress(OSError, ValueError, AttributeError, termios.error):  # closed, or no terminal at all
            if sys.stdin.isatty() and sys.stdout.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
                self._before = termios.tcgetattr(sys.stdin)
                tty.setcbreak(sys.stdin)
                self._descriptor = sys.stdin.fileno()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with suppress(OSError, termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    @property
    def there(self) -> bool:
        """Whether there is a keyboard."""
        return self._descriptor is not None

    def wait(self, seconds: float) -> str:
        """Wait for a key, at most so long; empty = none was pressed."""
        if self._descriptor is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._descriptor], [], [], seconds)
        if not ready:
            return ""
        pressed = os.read(self._descriptor, 64).decode("ascii", "replace")
        if not pressed:  # the terminal has gone
            self._descriptor = None
        return pressed
