from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.samples import ImageSample, Rejected, is_holdout, read_image_shard


def tar(*files: tuple[str, bytes], format_=tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format_) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read(*files, **options):
    return list(read_image_shard(io.BytesIO(tar(*files)), **options))


def test_members_come_in_any_order_and_others_are_ignored():
    assert read(
        ("a/x.txt", b" one cat \n"),
        ("a/x.JPG", b"J"),
        ("a/x.cls", b"3"),
        ("a/x.json", b'{"caption": "other", "n": 1}'),
        ("a/x.mask.png", b"M"),
        ("y.json", json.dumps({"caption": ["two", "", 3, "drei ü"]}).encode()),
        ("y.webp", b"W"),
        ("README", b"about"),
    ) == [
        ImageSample("a/x", b"J", ("one cat",), {"caption": "other", "n": 1}),
        ImageSample("y", b"W", ("two", "drei ü"), {"caption": ["two", "", 3, "drei ü"]}),
    ]


def test_the_caption_field_is_the_users():
    assert read(("x.png", b"P"), ("x.json", b'{"alt": "a dog"}'), caption_field="alt")[0].captions == ("a dog",)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("x.txt", b"cat")], "no_image"),
        ([("x.png", b"P"), ("x.jpg", b"J"), ("x.txt", b"cat")], "several_images"),
        ([("x.png", b"P")], "no_caption"),
        ([("x.png", b"P"), ("x.txt", b"  \n")], "no_caption"),
        ([("x.png", b"P"), ("x.json", b'{"caption": 5}')], "no_caption"),
        ([("x.png", b"P"), ("x.txt", b"caf\xe9")], "caption_not_utf8"),
        ([("x.png", b"P"), ("x.json", b'{"caption": "\\ud800"}')], "caption_not_utf8"),
        ([("x.png", b"P"), ("x.json", b"{")], "metadata_not_json"),
        ([("x.png", b"P"), ("x.json", b"[" * 100_000)], "metadata_not_json"),
        ([("x.png", b"P"), ("x.json", b'"text"')], "metadata_not_json"),
        ([("x.png", b"P"), ("x.png", b"P"), ("x.txt", b"cat")], "duplicate_member"),
        ([("../../x.png", b"P"), ("../../x.txt", b"cat")], "unsafe_key"),
        ([("/etc/x.png", b"P"), ("/etc/x.txt", b"cat")], "unsafe_key"),
        ([("x\udce9.png", b"P"), ("x\udce9.txt", b"cat")], "unsafe_key"),
    ],
)
def test_what_cannot_be_used_is_rejected_and_the_next_sample_read(files, reason):
    result = read(*files, ("z.png", b"Z"), ("z.txt", b"next"))
    assert [r.reason for r in result[:-1]] == [reason]
    assert result[-1] == ImageSample("z", b"Z", ("next",), {})


def test_a_key_that_comes_back_is_rejected():
    assert read(
        ("x.png", b"P"), ("x.txt", b"a"), ("y.png", b"P"), ("y.txt", b"b"), ("x.png", b"Q"), ("x.txt", b"c")
    ) == [
        ImageSample("x", b"P", ("a",), {}),
        ImageSample("y", b"P", ("b",), {}),
        Rejected("x", "duplicate_key"),
    ]


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(format_):
    key = "folder/" * 20 + "k" * 120
    data = tar((f"{key}.png", b"P"), (f"{key}.txt", b"cat"), format_=format_)
    assert [sample.key for sample in read_image_shard(io.BytesIO(data))] == [key]


@pytest.mark.parametrize("data", [b"", b"<html>not here</html>" * 40, tar()])
def test_a_shard_that_is_none_gives_no_sample(data):
    assert [r for r in read_image_shard(io.BytesIO(data)) if isinstance(r, ImageSample)] == []


def test_html_in_place_of_a_tar_is_a_reject():
    assert list(read_image_shard(io.BytesIO(b"<html>not here</html>" * 40))) == [Rejected("", "shard_damaged")]


def test_a_cut_shard_keeps_what_came_before():
    data = tar(("x.png", b"P"), ("x.txt", b"cat"), ("y.png", b"Q" * 2000), ("y.txt", b"dog"))
    result = list(read_image_shard(io.BytesIO(data[: 4 * 512 + 1000])))
    assert result[0] == ImageSample("x", b"P", ("cat",), {})
    assert result[-1] == Rejected("", "shard_damaged")
    assert not any(isinstance(r, ImageSample) for r in result[1:])


def test_a_shard_cut_between_members_is_told():
    # What belongs to the last sample may be missing, its metadata for example: it is dropped.
    data = tar(("x.png", b"P"), ("x.txt", b"cat"), ("y.png", b"Q"), ("y.txt", b"dog"))
    assert list(read_image_shard(io.BytesIO(data[: 4 * 512]))) == [Rejected("", "shard_damaged")]


def test_compressed_shards():
    data = tar(("x.png", b"P"), ("x.txt", b"cat"))
    assert list(read_image_shard(io.BytesIO(gzip.compress(data)))) == [ImageSample("x", b"P", ("cat",), {})]
    assert list(read_image_shard(io.BytesIO(gzip.compress(data)[:-20])))[-1] == Rejected("", "shard_damaged")


def test_a_bad_header_in_the_middle_is_told():
    data = bytearray(tar(("x.png", b"P"), ("x.txt", b"cat"), ("y.png", b"Q"), ("y.txt", b"dog")))
    data[4 * 512 + 10] ^= 1
    assert list(read_image_shard(io.BytesIO(bytes(data))))[-1] == Rejected("", "shard_damaged")


@given(st.text(max_size=20), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_holdout_grows_with_its_fraction(key, a, b):
    if is_holdout(key, min(a, b)):
        assert is_holdout(key, max(a, b))
    assert not is_holdout(key, 0.0)


def test_holdout_share_and_stability():
    held = {i for i in range(20_000) if is_holdout(f"{i:09d}", 0.1)}
    assert 0.09 < len(held) / 20_000 < 0.11
    assert sorted(held)[:6] == [2, 26, 30, 47, 51, 53]
