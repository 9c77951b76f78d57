from __future__ import annotations

import pytest

from pipeline.errors import LatheError
from pipeline.runtime.engine import Outcome
from pipeline.train.skipped_steps import LIMIT, SkippedSteps

GOOD, BROKEN, OVERFLOW = Outcome.APPLIED, Outcome.NOT_FINITE, Outcome.OVERFLOWED


def test_steps_are_counted_and_a_good_one_ends_a_row() -> None:
    skipped = SkippedSteps(total=3)
    skipped.count([BROKEN] * (LIMIT - 1) + [GOOD], step=10)
    assert (skipped.total, skipped.in_a_row) == (LIMIT + 2, 0)
    skipped.count([], step=11)
    skipped.count([BROKEN] * (LIMIT - 1), step=20)
    assert (skipped.total, skipped.in_a_row) == (2 * LIMIT + 1, LIMIT - 1)


def test_too_many_in_a_row_end_the_run_though_told_one_by_one() -> None:
    skipped = SkippedSteps()
    for step in range(1, LIMIT):
        skipped.count([BROKEN], step)
    with pytest.raises(LatheError, match="not finite in 10 steps in a row, by step 10") as error:
        skipped.count([BROKEN], LIMIT)
    assert "optimizer.learning_rate" in error.value.remedy


def test_a_loss_scale_that_finds_its_size_is_no_trouble() -> None:
    skipped = SkippedSteps()
    skipped.count([OVERFLOW] * 24, step=24)
    assert (skipped.total, skipped.in_a_row) == (24, 0)
