from __future__ import annotations

import gzip
import io
import itertools
import json
import tarfile
import tracemalloc
from collections.abc import Iterable

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.samples import (
    IMAGE_EXTENSIONS,
    ImageSample,
    Rejected,
    is_holdout,
    read_image_shard,
    split_name,
)


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
        ([("é\0y.png", b"P"), ("é\0y.txt", b"cat")], "unsafe_key"),
        ([("x\ny.png", b"P"), ("x\ny.txt", b"cat")], "unsafe_key"),
        ([("x\ty.png", b"P"), ("x\ty.txt", b"cat")], "unsafe_key"),
        ([("k" * 1001 + ".png", b"P"), ("k" * 1001 + ".txt", b"cat")], "key_too_long"),
        ([("é" * 501 + ".png", b"P"), ("é" * 501 + ".txt", b"cat")], "key_too_long"),
        ([("k\udce9" * 9999 + ".png", b"P")], "key_too_long"),
        ([("x.png", b"P"), ("x.PNG", b"P"), ("x.txt", b"cat")], "duplicate_member"),
        ([("x.png", b"P"), ("x.jpg", b"J"), ("x.webp", b"W"), ("x.txt", b"cat")], "several_images"),
        ([("x.mask.png", b"P"), ("x.txt", b"cat")], "no_image"),
        ([("x.png", b"P"), ("x.txt", b"c" * (1 << 20))], "caption_too_long"),
        ([("x.png", b"P"), ("x.txt", b"c" * 65_537)], "caption_too_long"),
        ([("x.png", b"P"), ("x.json", json.dumps({"caption": ["cat", "c" * 65_537]}).encode())], "caption_too_long"),
        ([("x.png", b"P"), ("x.json", json.dumps({"caption": ["cat"] * 257}).encode())], "too_many_captions"),
        ([("x.png", b"P"), ("x.txt", b"cat"), ("x.json", b" " * (8 << 20) + b"{}")], "file_too_large"),
        ([("x.png", b"P"), ("x.json", b'{"caption": ' + b"9" * 5000 + b"}")], "metadata_not_json"),
        ([("x.png", b"P"), ("x.json", b"")], "metadata_not_json"),
    ],
)
def test_what_cannot_be_used_is_rejected_and_the_next_sample_read(files, reason):
    result = read(*files, ("z.png", b"Z"), ("z.txt", b"next"))
    assert [r.reason for r in result[:-1]] == [reason]
    assert result[-1] == ImageSample("z", b"Z", ("next",), {})


def test_the_limits_themselves_are_allowed():
    key, caption = "é" * 500, "c" * 65_536
    assert read((f"{key}.png", b"P"), (f"{key}.txt", caption.encode())) == [ImageSample(key, b"P", (caption,))]
    captions = [str(i) for i in range(256)]
    assert read(("x.png", b"P"), ("x.json", json.dumps({"caption": captions}).encode()))[0].captions == tuple(captions)


def test_a_byte_order_mark_is_no_part_of_a_caption():
    assert read(("x.png", b"P"), ("x.txt", b"\xef\xbb\xbfcat"))[0].captions == ("cat",)


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_extensions_of_pictures_in_any_case(extension):
    assert read((f"x.{extension.upper()}", b"P"), ("x.TXT", b"cat")) == [ImageSample("x", b"P", ("cat",))]


@pytest.mark.parametrize("order", list(itertools.permutations(["x.png", "x.txt", "x.json"])))
def test_members_of_a_key_in_any_order(order):
    content = {"x.png": b"P", "x.txt": b"cat", "x.json": b'{"n": 1}'}
    expected = [ImageSample("x", b"P", ("cat",), {"n": 1}), ImageSample("z", b"Z", ("dog",))]
    assert read(*((name, content[name]) for name in order), ("z.png", b"Z"), ("z.txt", b"dog")) == expected


def test_links_folders_and_other_files_between_are_ignored():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in (
            ("x.png", b"0"),
            ("x.jpg", b"2"),
            ("x.webp", b"1"),
            ("x", b"5"),
            ("x.txt", b"0"),
            ("._x.png", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x.png" if kind in b"12" else ""
            info.size = 3 if kind == b"0" else 0
            archive.addfile(info, io.BytesIO(b"cat"))
    assert list(read_image_shard(io.BytesIO(stream.getvalue()))) == [ImageSample("x", b"cat", ("cat",))]


def test_a_picture_of_over_128_mib_is_not_read_into_memory():
    info = tarfile.TarInfo("x.png")
    info.size = (128 << 20) + 1024
    head = info.tobuf()

    class Zeros(io.RawIOBase):
        left = info.size

        def read(self, size: int = -1) -> bytes:
            nonlocal head
            if head:
                block, head = head, b""
                return block
            size = min(size, self.left)
            self.left -= size
            return bytes(size) if size else rest.read(1 << 20)

    rest = io.BytesIO(tar(("x.txt", b"cat"), ("z.png", b"Z"), ("z.txt", b"next")))
    tracemalloc.start()
    try:
        result = list(read_image_shard(Zeros()))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert result == [Rejected("x", "file_too_large"), ImageSample("z", b"Z", ("next",))]
    assert list(read_image_shard(io.BytesIO(info.tobuf()))) == [Rejected("", "shard_damaged")]


def test_a_shard_cut_anywhere_gives_whole_samples_or_none():
    files = [(f"{key}.{kind}", f"{key} {kind}".encode() * 40) for key in "abc" for kind in ("png", "txt", "cls")]
    data = tar(*files)
    whole = list(read_image_shard(io.BytesIO(data)))
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    assert len(whole) == 3
    for cut in range(0, len(data), 7):
        result = list(read_image_shard(io.BytesIO(data[:cut])))
        if cut >= end + 512:  # of the end mark one block of zeros suffices
            assert result == whole
        else:
            assert result == [*whole[: len(result) - 1], Rejected("", "shard_damaged")]


@given(st.text("ab./_é-", max_size=12))
def test_names_are_taken_apart_as_webdataset_does(name):
    key, extension = split_name(name)
    hidden = name.rpartition("/")[2].startswith(".")  # webdataset takes the folder's name for the key
    if key or not (hidden or name.startswith("__")):
        expected = webdataset.tariterators.base_plus_ext(name)
        assert (key, extension) == (expected[0] or "", expected[1] or "")


def test_names_that_are_passed_over():
    for name in ("README", "", ".png", "a/.png", "__meta__/x.png", "__meta__.png__", "a.b/", "a.b/c"):
        assert split_name(name) == ("", ""), name
    assert split_name("__x.png") == ("__x", "png")


def test_plain_webdataset_reads_the_same(tmp_path):
    files = [(f"f{i % 3}/{i:05d}.{kind}", f"{i} {kind}".encode()) for i in range(50) for kind in ("JPG", "txt", "json")]
    files = [(name, b"{}" if name.endswith("json") else data) for name, data in files]
    path = tmp_path / "0.tar"
    path.write_bytes(tar(*files))
    theirs = [(s["__key__"], s["jpg"], s["txt"]) for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    with path.open("rb") as stream:
        ours = [(s.key, s.image_bytes, s.captions[0].encode()) for s in read_image_shard(stream)]
    assert ours == theirs


def test_a_key_that_comes_back_is_rejected():
    assert read(
        ("x.png", b"P"), ("x.txt", b"a"), ("y.png", b"P"), ("y.txt", b"b"), ("x.png", b"Q"), ("x.txt", b"c")
    ) == [
        ImageSample("x", b"P", ("a",), {}),
        ImageSample("y", b"P", ("b",), {}),
        Rejected("x", "duplicate_key"),
    ]


def test_keys_of_a_megabyte_are_not_kept():
    names = [f"{i % 60:02d}" + "k" * 1_000_000 + end for i in range(120) for end in (".png", ".png", ".txt")]
    stream = io.BufferedReader(_Joined(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT) for name in names), 1 << 20)
    tracemalloc.start()
    try:
        rejects = list(read_image_shard(stream))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    # The last is dropped: there is no end mark.
    assert [reject.reason for reject in rejects] == [
        *["duplicate_member"] * 60,
        *["duplicate_key"] * 59,
        "shard_damaged",
    ]
    assert max(len(reject.key) for reject in rejects) == 1000


class _Joined(io.RawIOBase):
    """Parts, one behind the other, one at a time in memory."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts, self._rest = iter(parts), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._rest = self._rest or next(self._parts, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


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
