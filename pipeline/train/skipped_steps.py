"""Steps that changed nothing because loss or gradient was not finite: how many, and when they are too many."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import LatheError
from pipeline.runtime.engine import Outcome

LIMIT = 10
"""Skipped steps in a row after which a run is given up."""


class SkippedSteps:
    """Counts over a run.

    Args:
        total: those of the steps before.
    """

    def __init__(self, total: int = 0) -> None:
        self.total, self.in_a_row = total, 0

    def count(self, outcomes: Iterable[Outcome], step: int) -> None:
        """Add what is known of the steps up to `step`.

        A step of float16 that overflowed at a loss scale which was then halved counts, but not towards the limit: that
        is how the scale finds its size.

        Raises:
            LatheError: too many in a row.
        """
        for outcome in outcomes:
            self.total += outcome.skipped
            if outcome is Outcome.APPLIED:
                self.in_a_row = 0
            elif outcome is Outcome.NOT_FINITE:
                self.in_a_row += 1
            if self.in_a_row >= LIMIT:
                raise LatheError(
                    f"loss or gradient was not finite in {LIMIT} steps in a row, by step {step}",
                    "resume with a smaller optimizer.learning_rate; the last checkpoint is from before",
                )
