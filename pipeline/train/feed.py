"""Batches, one in hand ahead, so that all ranks know before a step whether each of them has its part of it.

A step is begun only where all have said that they hold its batch; they said so before the step that came before it,
and that travelled while it was computed. So a rank that was asked to stop while it waits for data, or cannot get them,
still takes part in the step that it holds, and all leave after it. A rank that waits for data says so every second:
none is in a collective for longer than that, deaf to signals of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.data.batch import Batch
from pipeline.data.loader import LatentLoader
from pipeline.errors import LatheError
from pipeline.runtime.process import Process
from pipeline.train.preemption import StopRequest

_FAILED = 1 << 16  # beyond any signal's number
_PATIENCE_SECONDS = 1.0  # so long a rank waits for data before it says so


class Feed:
    """Gives the same steps to all ranks.

    Args:
        loader: of this rank's batches.
        ranks: this rank among the others.
        request: whether this process was asked to stop.
        steps: how many batches are wanted.
        own: further flags of this rank, which travel with the others.
        hear: given the largest of each of them, on all ranks, for every second that one of them waits for data.
    """

    def __init__(
        self,
        loader: LatentLoader,
        ranks: Process,
        request: StopRequest,
        steps: int,
        *,
        own: Callable[[], tuple[int, ...]] = tuple,
        hear: Callable[[tuple[int, ...]], None] = lambda told: None,
    ) -> None:
        self._loader, self._ranks, self._request, self._left = loader, ranks, request, steps
        self._own, self._hear = own, hear
        self._problem: LatheError | None = None
        self._held: Batch | None = None
        self._flag, self._over = 0, False
        self.waited_seconds = 0.0
        """What the last `next` waited for data, in seconds."""
        self.ranks_wait_seconds = 0.0
        """What it waited for other ranks, most of which wait for data."""
        self.told: tuple[int, ...] = ()
        """The largest that a rank had of each further flag, a step ago; the same on all ranks after each `next`."""
        self._hold()

    @property
    def stopped_by(self) -> int:
        """The signal that one of the ranks was asked to stop by; 0 = none."""
        return 0 if self._flag == _FAILED else self._flag

    @property
    def failed(self) -> bool:
        """Whether a rank could not get its batch."""
        return self._flag == _FAILED

    @property
    def is_over(self) -> bool:
        """Whether there are no more batches, and no failure is the reason."""
        return self._over and not self.failed

    def next(self) -> Batch | None:
        """The next step's batch; the one after it is waited for, but not for long.

        None, on all ranks at the same step, where there are no more, one was asked to stop, or one failed.
        """
        self.waited_seconds = self.ranks_wait_seconds = 0.0
        while self._somebody_waits():
            self._hear(self.told)
            self._hold()
        batch, self._held = self._held, None
        self._over = batch is None or self._flag != 0
        if self._over:
            self._request.take_over(self.stopped_by)
            return None
        self._hold()
        return batch

    def raise_failure(self) -> None:
        """Raise what kept this rank from its batch; OtherRankError on the others."""
        self._ranks.agree(self._problem)

    def _somebody_waits(self) -> bool:
        """Hear what all ranks have posted; whether one of them has no batch yet, and nothing ends the run."""
        if self._held is not None:
            self._ranks.watch.note("waits for other ranks")
        started = time.perf_counter()
        self._flag, waiting, *told = self._ranks.posted()
        self.ranks_wait_seconds += time.perf_counter() - started
        self.told = tuple(told)
        return bool(waiting) and not self._flag

    def _hold(self) -> None:
        """Take the batch after this, unless there is one; for a second at most. Then tell the others."""
        if self._held is None and self._left > 0:
            self._ranks.watch.note("waits for data")
            started = time.perf_counter()
            deadline = started + _PATIENCE_SECONDS
            try:
                self._held = self._loader.take(lambda: self._request.signal != 0 or time.perf_counter() > deadline)
                self._left -= self._held is not None
            except LatheError as error:
                self._problem, self._left = error, 0
            self.waited_seconds += time.perf_counter() - started
        waiting = self._held is None and self._left > 0
        try:
            self._ranks.post(_FAILED if self._problem else self._request.signal, waiting, *self._own())
        except RuntimeError:
            if self._problem is None:
                raise
            raise self._problem from None  # the others did not wait so long: this is why
