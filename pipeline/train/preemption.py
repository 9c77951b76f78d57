"""Asked to stop: the signal is noted, and the loop leaves at a step that all ranks agree on."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.stopping import give_way, not_ignored

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """While it is entered, signals that ask to stop are noted in `signal` (0 = none) and do nothing else.

    They are SIGTERM, SIGINT, SIGHUP unless it was ignored, and what schedulers send ahead of a limit, SIGUSR1 and
    SIGUSR2. The first one counts: a launcher may send the same again, and a second one does not disturb the checkpoint
    that the first one led to. Once asked, the process ignores them to its end. Left by an error, it ignores SIGTERM:
    launchers send it to the others as soon as one rank has ended, and these may still have to say why.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        give_way()
        self._before = {number: signal.signal(number, self._note) for number in not_ignored(_SIGNALS)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception)
        for number, handler in self._before.items():
            ignored = self.signal or (failed and number == signal.SIGTERM)
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def take_over(self, number: int) -> None:
        """Another rank was asked to stop (0 = none), which counts as if this one had been."""
        self.signal = self.signal or number

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number
