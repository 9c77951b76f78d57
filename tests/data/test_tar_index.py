"""Members found at once are those that are found in turn, whatever the bytes."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import tar_index
from pipeline.data.tar import TarBuilder, members
from pipeline.data.tar_index import find_members
from pipeline.errors import DataError

PARTS = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60)
NAMES = st.one_of(
    st.from_regex(r"[a-z0-9]{1,9}(/[a-z0-9.]{1,9})?\.(latent\.npy|json)", fullmatch=True),
    st.lists(PARTS, min_size=1, max_size=4).map("/".join),
)
CONTENTS = st.one_of(st.binary(max_size=40), st.integers(0, 1600).map(bytes), st.just(b"ustar\x0000" * 200))
FILES = st.lists(st.tuples(NAMES, CONTENTS), min_size=1, max_size=6)


def archive(files: list[tuple[str, bytes]]) -> bytes:
    tar = TarBuilder()
    for name, content in files:
        tar.add(name, content)
    return bytes(tar.finish()[: tar.size - 1024])


def in_turn(data: bytes) -> list[tuple[str, int, int]] | str:
    try:
        return list(members(data))
    except DataError as error:
        return error.message


def at_once(data: bytes) -> list[tuple[str, int, int]] | str:
    try:
        names, starts, sizes = find_members(data)
    except DataError as error:
        return error.message
    return list(zip(names, starts.tolist(), sizes.tolist(), strict=True))


@given(FILES)
def test_the_members_are_those_found_in_turn(files: list[tuple[str, bytes]]) -> None:
    data = archive(files)
    assert at_once(data) == in_turn(data)


@given(FILES, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans())
def test_other_writers_tars_are_read_too(files: list[tuple[str, bytes]], form: int, owned: bool) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="replace") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.uname, info.mtime = ("ö" * owned, 1.5 if owned else 0)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # ustar cannot say the name
                continue
    data = stream.getvalue()
    assert at_once(data) == in_turn(data)


@settings(max_examples=120)
@given(FILES, st.data())
def test_changed_headers_make_no_difference(files: list[tuple[str, bytes]], data: st.DataObject) -> None:
    """With a checksum that holds all the same, as a faulty writer would have it."""
    tar = bytearray(archive(files))
    at = data.draw(st.sampled_from([start - 512 for _, start, _ in members(bytes(tar))]))
    fields = [0, 99, 124, 135, 156, 257, 263, 345]
    for place in data.draw(st.lists(st.sampled_from(fields) | st.integers(0, 511), min_size=1, max_size=3)):
        tar[at + place] = data.draw(st.sampled_from(b"\0 /1x5gLS7\x80") | st.integers(0, 255))
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    assert at_once(bytes(tar)) == in_turn(bytes(tar))


@given(FILES, st.data())
def test_changed_and_missing_bytes_make_no_difference(files: list[tuple[str, bytes]], data: st.DataObject) -> None:
    tar = bytearray(archive(files))
    for _ in range(data.draw(st.integers(0, 3))):
        tar[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(tar[: data.draw(st.integers(0, len(tar)))])
    assert at_once(cut) == in_turn(cut)


@pytest.mark.parametrize("key", ["000000001", "a/b.c/d", "bücher/ä", "folder/" * 20 + "key"])
def test_what_our_writer_makes_is_found_at_once(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "members", None)
    files = [(f"{key}{i}.{part}", bytes(700 * i)) for i in range(5) for part in ("latent.npy", "json")]
    found = at_once(archive(files))
    assert [(name, size) for name, _, size in found] == [(name, len(content)) for name, content in files]
