from __future__ import annotations

import pytest

from pipeline.config import FiltersConfig
from pipeline.data.filters import Filters
from pipeline.data.samples import ImageSample
from pipeline.errors import ConfigError


def sample(*captions: str, **metadata) -> ImageSample:
    return ImageSample("key", b"", captions or ("a cat",), metadata)


def test_no_filters_want_everything():
    filters = Filters(FiltersConfig())
    assert filters.of_sample(sample()) is None
    assert filters.of_size(1, 100_000) is None
    assert filters.captions(sample("a", "b" * 9999)) == ("a", "b" * 9999)


def test_captions_within_the_limits_are_kept():
    filters = Filters(FiltersConfig(min_caption_chars=3, max_caption_chars=5))
    some = sample("ab", "abc", "äöüxy", "abcdef")
    assert filters.captions(some) == ("abc", "äöüxy")
    assert filters.of_sample(some) is None
    assert filters.of_sample(sample("ab", "abcdef")) == "filtered_caption"


def test_the_condition_is_on_the_metadata():
    filters = Filters(FiltersConfig(where="punsafe < 0.1", min_caption_chars=2))
    assert filters.of_sample(sample(punsafe=0.05)) is None
    assert filters.of_sample(sample(punsafe=0.5)) == "filtered_where"
    assert filters.of_sample(sample()) == "filtered_where"
    assert filters.of_sample(sample("a")) == "filtered_caption"


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (64, 64, None),
        (64, 128, None),
        (128, 64, None),
        (63, 64, "filtered_min_side"),
        (64, 63, "filtered_min_side"),
        (64, 129, "filtered_aspect"),
        (129, 64, "filtered_aspect"),
        (63, 9999, "filtered_min_side"),
    ],
)
def test_sizes(height, width, reason):
    assert Filters(FiltersConfig(min_side=64, max_aspect=2)).of_size(height, width) == reason


def test_a_condition_that_is_none_is_told_at_once():
    with pytest.raises(ConfigError, match=r"images\.filters\.where: .*character 11"):
        Filters(FiltersConfig(where="punsafe < "))
    assert Filters(FiltersConfig(where=" \n")).of_sample(sample()) is None
