"""Blocks: every sample with its own arrays, damage by name, and no byte read that is not the block's."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_blocks import BUCKET, JOINT, MARKS, TRIMMED, archive, layout_of, parse, parts, read_blocks
from latent_shards import key, moments, text, write_latents

from pipeline.data.gather import gather
from pipeline.data.latent_block import LatentBlock
from pipeline.data.layout import FIXED_COLUMNS, JSON, Layout
from pipeline.data.samples import split_name
from pipeline.data.tar import members, npy_bytes, read_npy
from pipeline.errors import DataError

Members = dict[str, bytes]


def array_of(block: LatentBlock, layout: Layout, row: int, column: int) -> np.ndarray:
    """An array of a sample, from where the block says it is."""
    array = layout.fixed.get(column) or layout.text[(column - FIXED_COLUMNS) % len(layout.text)].array
    cell = row * block.width + column
    first = block.tokens[cell] if block.tokens is not None and array.trimmed else array.shape[0]
    count = first * int(np.prod(array.shape[1:]))
    assert block.starts[cell] >= 0
    found = np.frombuffer(block.data, array.dtype, count, block.starts[cell])
    return found.reshape(first, *array.shape[1:])


def assert_as_in_turn(block: LatentBlock, layout: Layout) -> None:
    """Each array is that of the sample's own member, read by itself."""
    found = {split_name(name): block.data[start : start + size] for name, start, size in members(block.data)}
    for row, own in enumerate(block.keys):
        there = [(layout.columns.get(extension, -1), data) for (one, extension), data in found.items() if one == own]
        columns = {column: data for column, data in there if column >= 0}
        for column, data in columns.items():
            if column != JSON:
                np.testing.assert_array_equal(array_of(block, layout, row, column), read_npy(data))
        texts = [column for column in columns if column >= FIXED_COLUMNS]
        assert len(texts) == block.captions(row) * len(layout.text)


@pytest.mark.parametrize("mode", MARKS)
@pytest.mark.parametrize("prefix", ["", "a.b/c_d/", "bücher/", "long/" * 25])
def test_samples_of_the_encoders_shards_have_their_own_arrays(tmp_path: Path, mode: str, prefix: str) -> None:
    mark = MARKS[mode]
    url = write_latents(tmp_path, [{BUCKET: (19, 2)}], captions=3, fingerprint=mark, prefix=prefix)
    blocks, layout = read_blocks(url)
    names = [own for block in blocks for own in block.keys]
    assert names == [key(0, number, prefix) for number in range(19)]
    assert [len(block) for block in blocks] == [8, 8, 3]
    for block in blocks:
        assert block.mirrored == mark.flip
        assert_as_in_turn(block, layout)
        for row, own in enumerate(block.keys):
            np.testing.assert_array_equal(array_of(block, layout, row, 0), moments(own, 2, 4))
            assert block.captions(row) == 3
            assert block.caption_texts(row) == [f"{own} {caption}" for caption in range(3)]
            for caption in range(3):
                for number, array in enumerate(text(own, caption, mark).values()):
                    column = FIXED_COLUMNS + caption * len(layout.text) + number
                    np.testing.assert_array_equal(array_of(block, layout, row, column), array)


def test_mirrored_latents_are_passed_over_where_they_are_not_wanted(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [{BUCKET: (3, 0)}], fingerprint=MARKS["online"])
    (block,), _ = read_blocks(url, flip=False)
    assert not block.mirrored


def foreign(mode: str) -> tuple[bytes, Layout]:
    """Members in another order, more of them, .npy headers as other writers have them."""
    layout = layout_of(MARKS[mode])
    samples = {}
    for number, captions in enumerate((2, 1, 3)):
        found = dict(reversed(parts(layout, captions).items()))
        if number:
            stream = io.BytesIO()
            np.lib.format.write_array(stream, read_npy(found["size.npy"]), version=(2, 0))
            found["size.npy"] = stream.getvalue()
        samples[f"k.d/{number}"] = {"cls": b"7"} | found | {"jpg": bytes(900)}
    return archive(samples), layout


@pytest.mark.parametrize("mode", MARKS)
def test_order_other_members_and_other_headers_do_not_matter(mode: str) -> None:
    data, layout = foreign(mode)
    block = parse(data, layout, 3)
    assert (block.keys, block.counts) == (["k.d/0", "k.d/1", "k.d/2"], [2, 1, 3])
    assert_as_in_turn(block, layout)


def without(name: str) -> Callable[[Members], Members]:
    return lambda found: {n: data for n, data in found.items() if n != name}


def instead(name: str, data: bytes | np.ndarray) -> Callable[[Members], Members]:
    return lambda found: found | {name: data if isinstance(data, bytes) else npy_bytes(data)}


def fortran() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(np.zeros((4, 2, 4), np.float16)))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("latent.npy"), r"sample 'a/1' is not whole: it has only json, latent_flip\.npy, pooled0\.clip_g\.npy"),
        (without("json"), r"'a/1' is not whole"),
        (without("size.npy"), r"'a/1' is not whole"),
        (without("latent_flip.npy"), r"'a/1' is not whole"),
        (without("text0.clip_l.npy"), r"'a/1' is not whole"),
        (without("pooled0.clip_g.npy"), r"'a/1' is not whole"),
        (without("text1.clip_g.npy"), r"'a/1' is not whole"),
        (
            instead("latent.npy", np.zeros((4, 3, 4), np.float16)),
            r"'a/1' holds float16 \[4, 3, 4\] where the manifest says float16 \[4, 2, 4\]",
        ),
        (instead("latent.npy", np.zeros((4, 2, 4), ">f2")), r"'a/1' holds >f2 \[4, 2, 4\] where"),
        (instead("latent.npy", fortran()), r"holds float16 \[4, 2, 4\] in Fortran order where"),
        (instead("latent_flip.npy", np.zeros((4, 2, 4), np.float32)), "holds float32"),
        (instead("size.npy", np.zeros(6, np.int64)), r"holds int64 \[6\] where the manifest says int32 \[6\]"),
        (
            instead("text1.clip_l.npy", np.zeros((5, 3), np.float16)),
            r"holds float16 \[5, 3\] where the manifest says float16 \[4, 3\] or fewer tokens",
        ),
        (instead("text0.clip_l.npy", np.zeros((0, 3), np.float16)), r"holds float16 \[0, 3\]"),
        (instead("pooled0.clip_g.npy", np.zeros(5, np.float16)), r"holds float16 \[5\]"),
        (instead("latent.npy", b"no array"), "an array could not be read"),
        (instead("latent.npy", b""), "an array could not be read"),
        (instead("latent.npy", npy_bytes(np.zeros((4, 2, 4), np.float16))[:-1]), "an array could not be read"),
        (instead("LATENT.npy", npy_bytes(np.zeros((4, 2, 4), np.float16))), r"'a/1\.latent\.npy' is there twice"),
        (lambda found: {}, "2 samples in place of 3"),
    ],
)
def test_a_sample_that_is_not_as_the_manifest_says_is_named(change: Callable[[Members], Members], message: str) -> None:
    layout = layout_of(TRIMMED)
    whole = parts(layout, captions=2)
    with pytest.raises(
        DataError, match=rf"^s3://b/00003\.tar: samples 16 to 18 \(bytes 512 to \d+\): .*{message}"
    ) as told:
        parse(archive({"a/0": whole, "a/1": change(whole), "a/2": whole}), layout, 3)
    assert "lathe encode" in told.value.remedy
    assert "\n" not in told.value.message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:9000], r"samples 0 to 7 \(bytes 0 to \d+\): the shard ends after \d+ of these \d+ bytes"),
        (lambda data: b"", "the shard ends after 0 of these"),
        (
            lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:],
            r"are damaged: the checksum is not the receipt's",
        ),
    ],
)
def test_missing_and_changed_bytes_are_told(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    url = write_latents(tmp_path, [{BUCKET: (9, 0)}], fingerprint=JOINT)
    shard = tmp_path / "00000.tar"
    data = shard.read_bytes()
    shard.write_bytes(damage(data))
    with pytest.raises(DataError, match=message):
        read_blocks(url)


@pytest.mark.parametrize(
    "about", [b"", b"{}", b"[]", b"7", b'{"captions": ["one"]}', b'{"captions": 2}', b"\xff", b"[" * 9999]
)
def test_captions_that_the_json_does_not_tell(about: bytes) -> None:
    layout = layout_of(JOINT)
    block = parse(archive({"a": parts(layout, captions=2) | {"json": about}}), layout, 1)
    with pytest.raises(DataError, match=r"the JSON of 'a' does not tell its 2 captions"):
        block.caption_texts(0)


def use(data: bytes, layout: Layout, samples: int) -> None:
    """All that can be done with a block; it may refuse to be one."""
    try:
        block = parse(data, layout, samples)
    except DataError:
        return
    assert len(block) == samples
    rows = [(block, row) for row in range(samples)]
    gather(rows, [count - 1 for count in block.counts], [block.mirrored] * samples, layout)
    for row in range(samples):
        assert len(block.keys[row]) > 0
        for column in range(block.width):
            if column != JSON and block.starts[row * block.width + column] >= 0:
                array_of(block, layout, row, column)  # frombuffer refuses what is outside the block


@settings(max_examples=120)
@given(st.sampled_from(sorted(MARKS)), st.data())
def test_whatever_the_bytes_nothing_else_is_read_and_only_data_errors_come(mode: str, data: st.DataObject) -> None:
    tar, layout = foreign(mode)
    changed = bytearray(tar)
    headers = [start - 512 for _, start, _ in members(tar)]
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 1023))
        at = data.draw(st.sampled_from([near, data.draw(st.integers(0, len(tar) - 1))])) % len(tar)
        changed[at] = data.draw(st.integers(0, 255) | st.sampled_from(b"0179x \0,(){}"))
    for at in headers:  # or the checksums would refuse what was changed in headers
        changed[at + 148 : at + 156] = b" " * 8
        changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    use(bytes(changed), layout, 3)


@given(st.binary(max_size=3000), st.integers(1, 3))
def test_any_bytes_at_all(data: bytes, samples: int) -> None:
    use(data, layout_of(TRIMMED), samples)


@given(st.sampled_from(sorted(MARKS)), st.integers(0, 60_000), st.integers(1, 4))
def test_a_receipt_that_cuts_blocks_elsewhere(mode: str, end: int, samples: int) -> None:
    tar, layout = foreign(mode)
    use(tar[:end], layout, samples)


NAMES = st.sampled_from(
    ["latent.npy", "json", "size.npy", "tokens0.clip.npy", "tokens1.clip.npy", "x/y.json", "a__", "cls"]
)
KEYS = st.sampled_from(["a", "b", "a.b/c", "__a", "__a__/b", "a/b", "ä", ""])


@settings(max_examples=120)
@given(st.lists(st.tuples(KEYS, NAMES), max_size=12))
def test_keys_are_taken_apart_as_everywhere(found: list[tuple[str, str]]) -> None:
    """Samples are runs of members with one key by `split_name`, whatever stands in between."""
    layout = layout_of(JOINT)
    whole = parts(layout, captions=2)
    data = b"".join(archive({own: {name: whole.get(name, b"")}}) for own, name in found)
    runs: list[str] = []
    seen: list[set[str]] = []
    for own, name in found:
        known, extension = split_name(f"{own}.{name}")
        if known and (not runs or runs[-1] != known):
            runs.append(known)
            seen.append(set())
        if known and extension in seen[-1] and layout.columns.get(extension, -1) >= 0:
            return  # there twice, see above
        if known:
            seen[-1].add(extension)
    sound = all({"latent.npy", "json", "size.npy", "tokens0.clip.npy"} <= names for names in seen)
    if sound and runs:
        assert parse(data, layout, len(runs)).keys == runs
    else:
        with pytest.raises(DataError, match=r"not whole|in place of"):
            parse(data, layout, max(len(runs), 1))


def test_a_block_keeps_its_bytes_and_copies_none() -> None:
    data, layout = foreign("cached")
    block = parse(data, layout, 3)
    assert block.data.obj is data
    assert {field.name for field in dataclasses.fields(block)} >= {"keys", "counts"}
