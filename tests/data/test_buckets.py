from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.config import BucketsConfig
from pipeline.data.buckets import bucket_sizes, nearest_bucket, scale
from pipeline.errors import ConfigError

CONFIGS = st.builds(BucketsConfig, max_aspect=st.floats(1, 16), step=st.integers(1, 96))
SIDES = st.integers(1, 20_000)


def sizes(resolution: int, config: BucketsConfig) -> tuple[tuple[int, int], ...]:
    try:
        return bucket_sizes(resolution, config)
    except ConfigError:
        assume(False)
        raise


def test_without_buckets_there_is_the_square():
    assert bucket_sizes(72, None) == ((72, 72),)


def test_the_sizes_of_512():
    assert bucket_sizes(512, BucketsConfig()) == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


@given(st.integers(16, 1100), CONFIGS)
def test_sides_area_and_aspect(resolution, config):
    buckets = sizes(resolution, config)
    step = config.step
    assert list(buckets) == sorted(set(buckets))
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= resolution**2 < min(height * (width + step), (height + step) * width)
        assert max(height, width) <= config.max_aspect * min(height, width)
        assert (width, height) in buckets
    assert ((resolution, resolution) in buckets) == (resolution % step == 0)


@given(st.integers(16, 300), CONFIGS)
def test_no_size_is_forgotten(resolution, config):
    step, area = config.step, resolution**2
    steps = range(step, area + 1, step)
    expected = {
        (height, width)
        for height in steps
        if (width := area // height // step * step) and height + step > area / width
        if max(height, width) <= config.max_aspect * min(height, width)
    }
    try:
        assert set(bucket_sizes(resolution, config)) == expected
    except ConfigError:
        assert not expected


@given(SIDES, SIDES, st.integers(64, 1100), CONFIGS)
def test_the_nearest_is_nearest(height, width, resolution, config):
    buckets = sizes(resolution, config)
    found = nearest_bucket(height, width, buckets)

    def distance(bucket: tuple[int, int]) -> Fraction:
        ratio = Fraction(height, width) / Fraction(*bucket)
        return max(ratio, 1 / ratio)

    nearest = min(map(distance, buckets))
    assert distance(found) <= nearest * (1 + Fraction(1, 2**50))
    assert math.isclose(abs(math.log(height / width * found[1] / found[0])), math.log(nearest), abs_tol=1e-9)
    assert nearest_bucket(height, width, buckets[::-1]) == found
    assert found in buckets


@pytest.mark.parametrize(
    ("size", "buckets", "expected"),
    [
        ((100, 100), ((384, 640), (640, 384)), (384, 640)),  # equally far: the first
        ((640, 640), ((32, 32), (64, 64), (48, 48)), (64, 64)),  # equally near: the largest
        ((1, 10_000), ((384, 640), (512, 512), (640, 384)), (384, 640)),
        ((10_000, 1), ((384, 640), (512, 512), (640, 384)), (640, 384)),
    ],
)
def test_ties_and_slivers(size, buckets, expected):
    assert nearest_bucket(*size, buckets) == nearest_bucket(*size, buckets[::-1]) == expected


@given(SIDES, SIDES, SIDES, SIDES)
def test_scale_covers_and_no_more(height, width, rows, columns):
    factor = scale(height, width, (rows, columns))
    assert factor * height >= rows * (1 - 1e-12)
    assert factor * width >= columns * (1 - 1e-12)
    assert math.isclose(factor * height, rows) or math.isclose(factor * width, columns)


def test_a_run_file_that_leaves_no_size_is_told():
    with pytest.raises(ConfigError, match=r"images\.buckets: no size of at most 500 x 500 .* multiples of 64"):
        bucket_sizes(500, BucketsConfig(max_aspect=1))
