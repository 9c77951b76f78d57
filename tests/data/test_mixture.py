"""What several data sets give to a run: proportions, groups, places in a batch, statistics of the whole."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.mixture import (
    check_weights,
    group_by_batches,
    group_by_steps,
    mean_and_std,
    proportions,
    quotas,
)
from pipeline.data.order import Group
from pipeline.errors import ConfigError

parts = st.lists(st.fractions(Fraction(1, 10**6), 10**6), min_size=1, max_size=8)


def fractions(*numbers: int) -> list[Fraction]:
    return [Fraction(number) for number in numbers]


@given(parts=parts, spare=st.integers(0, 500))
def test_quotas_fill_the_batch_and_stay_near_their_share(parts, spare) -> None:
    places = len(parts) + spare
    given = quotas(parts, places)
    exact = [places * part / sum(parts) for part in parts]
    assert sum(given) == places
    assert min(given) >= 1
    if min(exact) >= 1:
        assert all(abs(have - want) < 1 for have, want in zip(given, exact, strict=True))
    for a, b in zip(range(len(parts)), range(1, len(parts)), strict=False):
        if parts[a] != parts[b]:
            assert (given[a] - given[b]) * (1 if parts[a] > parts[b] else -1) >= 0  # never less for more


@given(parts=parts, factor=st.fractions(Fraction(1, 1000), 1000), spare=st.integers(0, 100))
def test_quotas_depend_on_the_ratio_alone(parts, factor, spare) -> None:
    places = len(parts) + spare
    assert quotas([part * factor for part in parts], places) == quotas(parts, places)


@pytest.mark.parametrize(
    ("parts", "places", "expected"),
    [
        (fractions(1), 7, (7,)),
        (fractions(1, 1), 7, (4, 3)),  # of equal ones the first gains
        (fractions(1, 1, 1), 8, (3, 3, 2)),
        (fractions(1000, 1), 8, (7, 1)),
        (fractions(1000, 1, 1), 3, (1, 1, 1)),
        (fractions(50, 30, 20), 64, (32, 19, 13)),
        (fractions(20, 20, 1, 1, 1), 6, (2, 1, 1, 1, 1)),  # of equal ones the last loses a place
        (fractions(10, 10, 10, 1, 1, 1), 8, (2, 2, 1, 1, 1, 1)),
    ],
)
def test_quotas_of_known_cases(parts, places, expected) -> None:
    assert quotas(parts, places) == expected


def test_weights_are_read_as_decimals_and_their_sum_does_not_matter() -> None:
    assert proportions([0.1, 0.3], [1, 1]) == proportions([1, 3], [9, 9]) == (Fraction(1, 4), Fraction(3, 4))
    assert proportions([1e-9, 3e-9], [1, 1]) == (Fraction(1, 4), Fraction(3, 4))
    assert proportions([None, None], [30, 10]) == (Fraction(3, 4), Fraction(1, 4))


def test_weights_are_for_all_or_none() -> None:
    check_weights([None, None])
    check_weights([1.0, 2.0])
    with pytest.raises(ConfigError, match=r"datasets\.1\.weight is not given"):
        check_weights([1.0, None, 2.0])


def test_steps_take_one_stream_each_in_whole_numbers() -> None:
    groups = group_by_steps([Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)], 64)
    assert groups == (Group((0,), (64,), 1), Group((1,), (64,), 2), Group((2,), (64,), 3))


def test_batches_take_all_streams_of_a_bucket_in_order_of_size() -> None:
    tall, square = (96, 64), (64, 64)
    # stream 1 is of a bucket that the other data set does not have
    groups = group_by_batches([Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)], [tall, square, tall], 12)
    assert groups == (Group((1,), (12,), 1), Group((0, 2), (4, 8), 3))


def test_more_data_sets_than_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch: 2 places cannot be shared by the 3 data sets"):
        group_by_batches(fractions(1, 1, 1), [(64, 64)] * 3, 2)


def test_statistics_are_those_of_the_samples_together() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.normal(centre, spread, (n, 3)) for centre, spread, n in [(0, 1, 300), (5, 2, 100), (-3, 0.5, 200)]]
    mean, std = mean_and_std(
        proportions([None] * 3, [len(one) for one in sets]),
        [one.mean(0).tolist() for one in sets],
        [one.std(0).tolist() for one in sets],
    )
    together = np.concatenate(sets)
    assert np.allclose(mean, together.mean(0), rtol=0, atol=1e-12)
    assert np.allclose(std, together.std(0), rtol=0, atol=1e-12)


def test_statistics_of_one_data_set_are_its_own_to_the_bit() -> None:
    assert mean_and_std([Fraction(1)], [(0.1, 0.7)], [(math.pi, 1e-3)]) == ((0.1, 0.7), (math.pi, 1e-3))
