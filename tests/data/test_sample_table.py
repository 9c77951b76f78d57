"""Samples found by their pattern are those found name by name, whatever the names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_blocks import MARKS, archive, layout_of, parts

from pipeline.data import sample_table
from pipeline.data.sample_table import SampleTable, find_samples
from pipeline.data.tar import TarBuilder
from pipeline.errors import DataError

LAYOUT = layout_of(MARKS["joint"])
OWN = ["latent.npy", "size.npy", "json", "tokens0.clip.npy", "cls", "LATENT.NPY", "x/y.npy", "a.b"]
KEYS = st.one_of(
    st.from_regex(r"[0-9]{4}", fullmatch=True),
    st.from_regex(r"[a/]{2}[0-9]{2}", fullmatch=True),
    st.sampled_from(["00.1", "0001", "0_/1", "__x_", "é01", "000/", "/000"]),
)


def told(table: SampleTable | None) -> tuple[object, ...] | None:
    if table is None:
        return None
    return table.keys, table.table.tolist(), table.begins.tolist(), table.sizes.tolist(), table.names()


@given(st.lists(KEYS, min_size=1, max_size=6), st.lists(st.sampled_from(OWN), min_size=1, max_size=6), st.data())
def test_a_pattern_tells_what_the_names_tell(keys: list[str], extensions: list[str], data: st.DataObject) -> None:
    names = [f"{key}.{extension}" for key in keys for extension in extensions]
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(names) - 1))
        names[place] = data.draw(st.sampled_from(["", *names, "other.json", "000A.json"])) or names[place] + "x"
    tar = memoryview(archive_of(names))
    samples = data.draw(st.sampled_from([len(keys), 1, len(names), 2]))
    quick = sample_table._by_pattern(tar, LAYOUT, samples)
    if quick is not None:
        assert told(quick) == told(sample_table._one_by_one(tar, LAYOUT))


def archive_of(names: list[str]) -> bytes:
    """A tar with a member of some bytes under each name, in order; names may be there twice."""
    tar = TarBuilder()
    for number, name in enumerate(names):
        tar.add(name, bytes(number * 100))
    end = tar.size
    return bytes(tar.finish()[:end])


def test_the_encoders_blocks_are_told_by_their_pattern() -> None:
    tar = memoryview(archive({f"{number:04d}": parts(LAYOUT, 2) for number in range(5)}))
    assert told(sample_table._by_pattern(tar, LAYOUT, 5)) == told(find_samples(tar, LAYOUT, 5))
    assert sample_table._by_pattern(tar, LAYOUT, 5) is not None


def test_samples_that_differ_are_read_name_by_name() -> None:
    samples = {f"{number:04d}": parts(LAYOUT, 1 + number % 2) for number in range(4)}
    assert find_samples(memoryview(archive(samples)), LAYOUT, 4).keys == list(samples)


def test_a_member_that_is_there_twice_is_named() -> None:
    tar = memoryview(archive_of(["1.json", "1.latent.npy", "1.json"]))
    with pytest.raises(DataError, match=r"'1\.json' is there twice"):
        find_samples(tar, LAYOUT, 1)
