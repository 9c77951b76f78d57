"""Steps that changed nothing because loss or gradient was not finite: how many, and when they are too many."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.runtime.engine import Outcome

LIMIT = 10
"""Skipped steps in a row after which a run is given up."""


class SkippedSteps:
    """Counts over a run.

    Args:
        total: those of the steps before.
        in_a_row: of them, those that came last.
    """

    def __init__(self, total: int = 0, in_a_row: int = 0) -> None:
        self.total, self.in_a_row = total, in_a_row
        self.too_many = False
        """Whether `LIMIT` in a row have been met in this start."""

    def count(self, outcomes: Iterable[Outcome]) -> None:
        """Add what became of some steps.

        A step of float16 that overflowed at a loss scale which was then halved counts, but not towards the limit: that
        is how the scale finds its size.
        """
        for outcome in outcomes:
            self.total += outcome.skipped
            if outcome is Outcome.APPLIED:
                self.in_a_row = 0
            elif outcome is Outcome.NOT_FINITE:
                self.in_a_row += 1
                self.too_many = self.too_many or self.in_a_row >= LIMIT
