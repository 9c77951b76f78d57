from __future__ import annotations

from pipeline.runtime.engine import Outcome
from pipeline.train.skipped_steps import LIMIT, SkippedSteps

GOOD, BROKEN, OVERFLOW = Outcome.APPLIED, Outcome.NOT_FINITE, Outcome.OVERFLOWED


def test_steps_are_counted_and_a_good_one_ends_a_row() -> None:
    skipped = SkippedSteps(total=3)
    skipped.count([BROKEN] * (LIMIT - 1) + [GOOD])
    assert (skipped.total, skipped.in_a_row) == (LIMIT + 2, 0)
    skipped.count([])
    skipped.count([BROKEN] * (LIMIT - 1))
    assert (skipped.total, skipped.in_a_row) == (2 * LIMIT + 1, LIMIT - 1)
    assert not skipped.too_many


def test_too_many_in_a_row_are_noticed_though_told_one_by_one() -> None:
    skipped = SkippedSteps()
    for _ in range(LIMIT - 1):
        skipped.count([BROKEN])
    assert not skipped.too_many
    skipped.count([BROKEN])
    assert skipped.too_many


def test_a_row_goes_on_over_a_restart() -> None:
    skipped = SkippedSteps(total=12, in_a_row=LIMIT - 1)
    skipped.count([BROKEN])
    assert skipped.too_many


def test_a_loss_scale_that_finds_its_size_is_no_trouble() -> None:
    skipped = SkippedSteps()
    skipped.count([OVERFLOW] * 24)
    assert (skipped.total, skipped.in_a_row, skipped.too_many) == (24, 0, False)
