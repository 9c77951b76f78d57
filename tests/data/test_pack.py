from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.config import PackConfig
from pipeline.data import images
from pipeline.data.pack import pack, safe_key
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.errors import DataError, StorageError
from pipeline.storage import find_shards


def picture(i: int = 0) -> bytes:
    return images.png(np.full((4, 5, 3), i, np.uint8))


def fill(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def config(tmp_path, **fields) -> PackConfig:
    return PackConfig(**{"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), **fields})


def samples(tmp_path) -> list:
    shards = find_shards(str(tmp_path / "out"))
    return [s for shard in shards for s in read_image_shard(io.BytesIO(Path(shard).read_bytes()))]


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "in", ["b.png", "a.v2.PNG", "sub.d/é c.png", ".hidden.png", "__x__/d.png", "notes.md"])
    for name in ("b", "a.v2", "sub.d/é c", "__x__/d"):
        (tmp_path / "in" / f"{name}.txt").write_text(f" a {name} ü\n")
    return tmp_path / "in"


def test_text_files_beside_the_pictures(tmp_path, folder):
    seen = []
    summary = pack(config(tmp_path, samples_per_shard=3), lambda done, total: seen.append((done, total)))
    assert (summary.pictures, summary.shards, summary.written) == (4, 2, 2)
    assert seen == [(0, 4), (3, 4), (4, 4)]
    expected = {
        "_x__/d": ("__x__/d", "__x__/d.png"),
        "a_v2": ("a.v2", "a.v2.PNG"),
        "b": ("b", "b.png"),
        "sub.d/é c": ("sub.d/é c", "sub.d/é c.png"),
    }
    assert samples(tmp_path) == [
        ImageSample(key, (folder / file).read_bytes(), (f"a {name} ü",), {}) for key, (name, file) in expected.items()
    ]


def test_any_webdataset_reader_reads_them(tmp_path, folder):
    pack(config(tmp_path))
    dataset = webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False).decode("rgb8")
    assert {s["__key__"]: (s["png"].shape, s["txt"]) for s in dataset}["b"] == ((4, 5, 3), "a b ü")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_gives_captions_columns_and_order(tmp_path, kind):
    fill(tmp_path / "in", ["b.png", "d/a.png"])
    rows = [{"file_name": "d/a.png", "text": "ein ü, 'a'", "n": "7"}, {"file_name": "./b.png", "text": "b", "n": ""}]
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    else:
        text = "file_name,text,n\nd/a.png,\"ein ü, 'a'\",7\n./b.png,b,\n"
    (tmp_path / "in" / f"metadata.{kind}").write_text(text)
    (tmp_path / "in" / "b.txt").write_text("not this one")
    pack(config(tmp_path))
    assert samples(tmp_path) == [
        ImageSample("d/a", picture(1), ("ein ü, 'a'",), {"caption": "ein ü, 'a'", "n": "7"}),
        ImageSample("b", picture(0), ("b",), {"caption": "b", "n": ""}),
    ]


def test_the_same_folder_gives_the_same_bytes_and_only_what_is_missing_is_written(tmp_path, folder):
    settings = config(tmp_path, samples_per_shard=1, attribution="by A, CC-BY 4.0")
    pack(settings)
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.pop("ATTRIBUTION.txt") == b"by A, CC-BY 4.0\n"
    (out / "00001.tar").unlink()
    damaged = bytearray(before["00002.tar"])
    damaged[700] ^= 1
    (out / "00002.tar").write_bytes(damaged)
    untouched = out / "00000.tar"
    os.utime(untouched, (1, 1))
    assert pack(settings).written == 2
    assert untouched.stat().st_mtime == 1
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".tar"} == before


def table(*rows):
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("names", "texts", "message"),
    [
        ([], {}, "holds no pictures"),
        (["a.png", "b.png", "c.png"], {"b.txt": "x"}, "2 of 3 pictures have no caption, first a.png"),
        (["a.png"], {"a.txt": " \n"}, "1 of 1 pictures have no caption"),
        (["a.png", "a.jpg"], {"a.txt": "x"}, "a.jpg and a.png would both have the key 'a'"),
        (["a.b.png", "a_b.png"], {"a.b.txt": "x", "a_b.txt": "x"}, "would both have the key 'a_b'"),
        (
            ["a.png"],
            {"a.txt": "x", "b.png": "no picture", "b.txt": "x"},
            r"b\.png is not a usable picture: not_an_image",
        ),
        (
            ["a.png"],
            {"metadata.jsonl": table({"file_name": "b.png", "text": "x"})},
            "1 names b.png, which is no picture",
        ),
        (["a.png"], {"metadata.jsonl": table({"file_name": "../a.png", "text": "x"})}, "names ../a.png"),
        (["a.png"], {"metadata.jsonl": table({"file_name": "a.png"})}, "1 lacks file_name or text"),
        (["a.png"], {"metadata.jsonl": table([1])}, "1 is not a JSON object"),
        (["a.png"], {"metadata.jsonl": "\n{"}, r"metadata\.jsonl:2 is not JSON: Expecting .* at column 2"),
        (["a.png"], {"metadata.jsonl": "[" * 100_000}, "metadata.jsonl:1 cannot be read"),
        (
            ["a.png"],
            {"metadata.jsonl": table(*[{"file_name": "a.png", "text": "x"}] * 2)},
            "2 names a.png a second time",
        ),
        (
            ["a.png", "b.png"],
            {"metadata.csv": "file_name,text\na.png,x\n"},
            "1 of 2 pictures have no caption, first b.png",
        ),
        (["a.png"], {"metadata.csv": "name,text\na.png,x\n"}, "2 lacks file_name or text"),
        (["a.png"], {"metadata.csv": "", "metadata.jsonl": ""}, "has both"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, names, texts, message):
    (tmp_path / "in").mkdir()
    fill(tmp_path / "in", names)
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        pack(config(tmp_path))
    assert caught.value.remedy
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["b.txt", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_text_file_or_table_that_may_not_be_read_is_told_in_one_line(tmp_path, folder, monkeypatch, name, on_error):
    (folder / name).write_text("file_name,text\n")
    whole = Path.open

    def guarded(self, *args, **options):
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return whole(self, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(StorageError) as caught:
        pack(config(tmp_path, on_error=on_error))
    assert caught.value.message == f"{folder / name}: Permission denied"
    assert caught.value.remedy


def test_line_ends_and_odd_rows_of_a_folders_table(tmp_path):
    fill(tmp_path / "in", ["a.png", "b.png", "c.png"])
    text = b'\xef\xbb\xbf,file_name,text,n\r\n0,a.png,"a;b\r\nc",7\r\n\r\n1,b.png,short\r\n2,c.png,long,1,2,3\r\n'
    (tmp_path / "in" / "metadata.csv").write_bytes(text)
    pack(config(tmp_path))
    assert samples(tmp_path) == [
        ImageSample("a", picture(0), ("a;b\nc",), {"": "0", "caption": "a;b\nc", "n": "7"}),
        ImageSample("b", picture(1), ("short",), {"": "1", "caption": "short", "n": None}),
        ImageSample("c", picture(2), ("long",), {"": "2", "caption": "long", "n": "1"}),
    ]


def test_what_is_unusable_may_be_skipped(tmp_path):
    fill(tmp_path / "in", ["a.png", "b.png", "c.png"])
    (tmp_path / "in" / "b.png").write_text("no picture")
    (tmp_path / "in" / "metadata.jsonl").write_text(
        table(*({"file_name": name, "text": "x"} for name in ("z.png", "b.png", "c.png")))
    )
    summary = pack(config(tmp_path, on_error="skip"))
    assert [sample.key for sample in samples(tmp_path)] == ["c"]
    assert {reason: skipped.count for reason, skipped in summary.skipped.items()} == {
        "not_an_image": 1,
        "missing_file": 1,
        "no_caption": 1,
    }
    assert f"no_caption: 1, first: {tmp_path}/in/a.png has no caption" in str(summary)


def test_a_folder_of_tables_says_how_to_pack_them(tmp_path):
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "train.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="holds no pictures") as caught:
        pack(config(tmp_path))
    assert caught.value.remedy == f"to pack its tables, set source={tmp_path}/in/**/*.parquet"


GIF = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c000000000100010000020244010" + "03b"
)  # its bytes depend on no library
PACKED = {  # SHA-256 of the shards' names and bytes, as the first release wrote them
    "text": "916e2d3fe0c90c59f532398f4a95a58026481268ab6eb6f8b1c974d0ec9c7a59",
    "table": "9ac62f583329f2d299eec869cca665dc1cae431238ca6131930cd5a133d3a323",
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_bytes_are_those_of_earlier_releases(tmp_path, kind):
    names = ["b.gif", "a.v2.GIF", "d/é c.gif", "__x__/" + "n" * 120 + ".gif"]
    rows = []
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GIF)
        if kind == "text":
            path.with_suffix(".txt").write_text(f" a {path.name} ü\n")
        columns = {"n": i, "caption": "c", "f": float("nan")} if i % 2 else {}
        rows.append({"file_name": name, "text": f"a {name} ü", **columns})
    if kind == "table":
        (tmp_path / "in" / "metadata.jsonl").write_text(table(*rows))
    pack(config(tmp_path, samples_per_shard=3))
    digest = hashlib.sha256()
    for shard in sorted((tmp_path / "out").iterdir()):
        digest.update(shard.name.encode() + shard.read_bytes())
    assert digest.hexdigest() == PACKED[kind]


def test_a_missing_folder(tmp_path):
    with pytest.raises(StorageError, match="no such folder"):
        pack(config(tmp_path))


def test_other_shards_in_the_output_are_not_mixed_in(tmp_path, folder):
    pack(config(tmp_path, samples_per_shard=1))
    with pytest.raises(DataError, match=r"holds shards that this folder does not give: 00001\.tar"):
        pack(config(tmp_path, samples_per_shard=9))


def test_keys_are_safe():
    assert safe_key("a/b/c.tar.png") == "a/b/c_tar"
    assert safe_key("x\udce9\n.png") == "x__"
