"""Tables of pictures into shards: every kind of column, and everything that can be wrong with a table."""

from __future__ import annotations

import datetime
import json
import resource
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.config import PackConfig
from pipeline.data import images
from pipeline.data.pack import pack
from pipeline.data.picture_item import contained_key
from pipeline.errors import DataError, SetupError, StorageError

PICTURES = [images.png(np.full((4, 5, 3), i, np.uint8)) for i in range(4)]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a.png, b.png, sub/c.png, and d.png beside it."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png", "../d.png")):
        (folder / name).write_bytes(PICTURES[i])
    return folder


def run(place: Path, source: str, **fields):
    config = PackConfig(**{"source": str(place / source), "output": str(place.parent / "out"), **fields})
    return pack(config)


def samples(place: Path) -> dict[str, tuple[dict, ...]]:
    """Members of each sample: key -> {extension: content}, JSON parsed."""
    import tarfile

    found: dict[str, dict] = {}
    for shard in sorted((place.parent / "out").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                data = tar.extractfile(member).read()
                found.setdefault(key, {})[extension] = json.loads(data) if extension == "json" else data
    return found


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image,caption,n,id,gone\na.png,\"a, 'ü'\",7,007,\nsub/c.png,123,0.5,x y,\n"),
        ("t.csv", "\ufeffimage;caption;n;id;gone\r\na.png;a, 'ü';7;007;\r\nsub/c.png;123;0.5;x y;\r\n"),
        ("t.CSV", "image|caption|n|id|gone||\na.png|a, 'ü'|7|007|||\n\nsub/c.png|123|0.5|x y|||\n"),
        ("t.tsv", "image\tcaption\tn\tid\tgone\na.png\ta, 'ü'\t7\t007\t\nsub/c.png\t123\t0.5\tx y\t"),
        (
            "t.jsonl",
            lines(
                {"image": "a.png", "caption": " a, 'ü' ", "n": 7, "id": "007", "gone": None},
                {"image": "sub/c.png", "caption": "123", "n": 0.5, "id": "x y", "gone": float("nan")},
            ),
        ),
    ],
)
def test_text_tables(place, name, text):
    (place / name).write_text(text, newline="")
    summary = run(place, name)
    assert (summary.pictures, summary.shards, summary.written, summary.skipped) == (2, 1, 1, {})
    first = {"caption": "a, 'ü'", "n": 7, "id": "007", "gone": None}
    assert samples(place) == {
        "a": {"png": PICTURES[0], "txt": "a, 'ü'".encode(), "json": first},
        "sub/c": {"png": PICTURES[2], "txt": b"123", "json": {"caption": "123", "n": 0.5, "id": "x y", "gone": None}},
    }
    before = (place.parent / "out" / "00000.tar").read_bytes()
    assert run(place, name).written == 0
    assert (place.parent / "out" / "00000.tar").read_bytes() == before


def test_paths_may_be_absolute_or_lead_out_and_keys_stay_within(place):
    rows = [str(place / "a.png"), "./sub/../b.png", "../d.png", str(place.parent / "e.v2.bin")]
    (place.parent / "e.v2.bin").write_bytes(PICTURES[3])
    (place / "t.jsonl").write_text(lines(*({"image": row, "caption": "x", "nested": {"a": [1]}} for row in rows)))
    run(place, "t.jsonl")
    outside = str(place.parent / "e_v2_bin").lstrip("/")
    assert list(samples(place)) == ["a", "b", "d", outside]
    assert samples(place)[outside]["png"] == PICTURES[3]  # named by its bytes, where the path does not say
    assert samples(place)["a"]["json"] == {"caption": "x", "nested": {"a": [1]}}


def test_several_captions_of_lists_and_columns(place):
    rows = [
        {"image": "a.png", "caption": ["one", None, " ", "two"], "alt": "three"},
        {"image": "b.png", "caption": [], "alt": "only"},
        {"image": "sub/c.png", "caption": float("nan"), "alt": "lone \ud800"},
    ]
    (place / "t.jsonl").write_text(lines(*rows))
    run(place, "t.jsonl", caption_column=["caption", "alt"])
    found = samples(place)
    assert found["a"] == {"png": PICTURES[0], "json": {"caption": ["one", "two", "three"]}}
    assert found["b"] == {"png": PICTURES[1], "txt": b"only"}
    assert found["sub/c"]["txt"] == b"lone ?"


def test_keys_of_a_column(place):
    (place / "t.csv").write_text("image,caption,id\na.png,x,../../up.v1\nb.png,x,__7__\nb.png,x,a\\b\n")
    run(place, "t.csv", key_column="id")
    assert list(samples(place)) == ["up_v1", "_7__", "a_b"]


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_pictures_within_parquet(place, kind):
    column = (
        pa.array(
            [{"bytes": data, "path": None} for data in PICTURES[:3]] + [{"bytes": None, "path": "b.png"}], HF_IMAGE
        )
        if kind == "struct"
        else pa.array([*PICTURES[:3], PICTURES[1]], pa.large_binary())
    )
    table = pa.table({"image": column, "text": [["a", "b"], ["c"], ["d"], ["e"]], "mask": [b"\xff"] * 4})
    parquet.write_table(table, place / "train.v1.parquet", row_group_size=1)
    run(place, "train.v1.parquet", caption_column="text", samples_per_shard=3)
    found = samples(place)
    assert list(found) == [f"train_v1/{i:08d}" for i in range(4)]
    assert [sample["png"] for sample in found.values()] == [*PICTURES[:3], PICTURES[1]]
    assert found["train_v1/00000000"]["json"] == {"caption": ["a", "b"]}
    assert "json" not in found["train_v1/00000001"]  # bytes are no metadata


def test_parquet_values_are_said_in_json(place):
    when = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    values = {
        "when": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
        "deep": pa.array([[{"t": 1_700_000_000_000_000_001}]], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
        "zone": pa.array([when], pa.timestamp("us", "UTC")),
        "day": pa.array([datetime.date(2024, 1, 2)]),
        "clock": pa.array([1_001], pa.time64("ns")),
        "span": pa.array([1_500_000_001], pa.duration("ns")),
        "price": pa.array([Decimal("1.50")]),
        "nan": pa.array([float("nan")]),
        "inf": pa.array([float("inf")], pa.float32()),
        "half": pa.array([np.float16(0.5)], pa.float16()),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "kind": pa.array(["x"]).dictionary_encode(),
        "a.b": pa.array([2**62]),
        "flag": pa.array([True]),
        "none": pa.nulls(1),
    }
    parquet.write_table(pa.table({"image": ["a.png"], "caption": ["x"], "id": [17.0], **values}), place / "t.parquet")
    run(place, "t.parquet", key_column="id")
    assert samples(place)["17"]["json"] == {
        "caption": "x",
        "when": "2023-11-14T22:13:20",
        "deep": [{"t": "2023-11-14T22:13:20"}],
        "zone": "2024-01-02T03:04:05+00:00",
        "day": "2024-01-02",
        "clock": "00:00:00.000001",
        "span": 1.5,
        "price": 1.5,
        "nan": None,
        "inf": None,
        "half": 0.5,
        "map": [["k", 1]],
        "kind": "x",
        "a.b": 2**62,
        "flag": True,
        "none": None,
    }


def test_several_tables_by_pattern(place):
    for i, folder in enumerate((place, place / "sub")):
        column = pa.array([{"bytes": PICTURES[i], "path": "x.png"}], HF_IMAGE)
        parquet.write_table(pa.table({"image": column, "caption": ["x"]}), folder / "t.parquet")
    parquet.write_table(
        pa.table({"image": pa.array([], HF_IMAGE), "caption": pa.array([], pa.string())}), place / "u.parquet"
    )
    assert run(place, "**/*.parquet").pictures == 2
    assert list(samples(place)) == ["sub/t/00000000", "t/00000000"]


JSON = {"image": "a.png", "caption": "x"}


@pytest.mark.parametrize(
    ("name", "text", "fields", "message"),
    [
        ("t.csv", "file,caption\na.png,x\n", {}, r"t\.csv has no column image; it has file, caption"),
        ("t.csv", "image,caption\na.png,x\n", {"key_column": "id"}, "has no column id; it has image, caption"),
        ("t.csv", "image,caption\na.png,x\n", {"caption_column": ["caption", "alt"]}, "has no column alt"),
        ("t.csv", "image,caption,caption\na.png,x,y\n", {}, "has two columns of the name caption"),
        ("t.csv", "image,caption\na.png,one, two\n", {}, r"t\.csv:2 has 3 fields, the header has 2"),
        ("t.csv", "image,caption\na.png,\n", {}, r"t\.csv:2 has no caption"),
        ("t.csv", "image,caption\n,x\n", {}, r"t\.csv:2: column image is empty"),
        ("t.csv", "image,caption\nz.png,x\n", {}, r"t\.csv:2 names .*z\.png, which is not there"),
        ("t.csv", "image,caption\nsub,x\n", {}, "which is no file"),
        ("t.csv", "image,caption\n/dev/zero,x\n", {}, "which is no file"),
        ("t.csv", f"image,caption\n{'n' * 300}.png,x\n", {}, "is no path"),
        ("t.csv", f"image,caption\n{'n/' * 600}a.png,x\n", {}, "gives no key: it is longer than 1000 bytes"),
        ("t.csv", "image,caption\n..,x\n", {}, "gives no key: it is empty"),
        ("t.csv", "image,caption\nt.csv,x\n", {}, "is not a usable picture: not_an_image"),
        (
            "t.csv",
            "image,caption\na.png,x\nhttps://x.org/b.png,x\n",
            {},
            "t.csv:3: column image holds addresses: https",
        ),
        ("t.csv", "image,caption\ns3://b/b.png,x\n", {"on_error": "skip"}, "column image holds addresses: s3"),
        ("t.csv", "image,caption\na.png,x\n./a.png,y\n", {}, "t.csv:2 and .*t.csv:3 would both have the key 'a'"),
        ("t.csv", "image,caption,k\na.png,x,1\nb.png,x,\n", {"key_column": "k"}, "t.csv:3 gives no key: it is empty"),
        ("t.csv", 'image,caption\na.png,"x" y\n', {}, r"t\.csv:2 cannot be read: ',' expected after '\"'"),
        ("t.csv", 'image,"cap"tion\n', {}, "cannot be read"),
        ("t.csv", "", {}, "holds no rows"),
        ("t.csv", "image,caption\n", {}, "holds no rows"),
        ("t.jsonl", "\n \n", {}, "holds no rows"),
        ("t.jsonl", '[\n{"image": 1}]', {}, "is one JSON list, not one object a line"),
        ("t.jsonl", '{"image"\n', {}, r"t\.jsonl:1 is not JSON"),
        ("t.jsonl", "3\n", {}, r"t\.jsonl:1 is not a JSON object"),
        ("t.jsonl", lines({"img": "a.png"}, {"caption": "x"}), {}, "has no column image; it has img, caption"),
        ("t.jsonl", lines(JSON, {"caption": "x"}), {}, r"t\.jsonl:2: column image is empty"),
        ("t.jsonl", lines({**JSON, "image": 3}), {}, "column image holds int, which is no path"),
        ("t.jsonl", lines({**JSON, "caption": 3}), {}, "column caption holds int, not text"),
        ("t.jsonl", lines({**JSON, "caption": {"raw": "x"}}), {}, "column caption holds dict, not text"),
        ("t.jsonl", lines({**JSON, "image": "a\0.png"}), {}, "which is not there"),
        ("t.jsonl", lines({**JSON, "k": 1.5}), {"key_column": "k"}, "gives no key: it is float, not text"),
        ("t.jsonl", json.dumps(JSON)[:-1] + ', "d": ' + "[" * 800 + "]" * 800 + "}", {}, "is nested too deeply"),
        ("t.parquet", "PAR1 and then nothing", {}, r"t\.parquet cannot be read as Parquet"),
        ("t.xlsx", "x", {}, r"t\.xlsx is no table that Lathe reads"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_anything_is_written(place, name, text, fields, message):
    (place / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        run(place, name, **fields)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    assert not (place.parent / "out").exists()


def test_files_that_are_not_utf8_or_not_there(place):
    (place / "t.csv").write_bytes("image,caption\na.png,ü\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        run(place, "t.csv")
    for missing in ("u.csv", "*.parquet"):
        with pytest.raises(StorageError, match="no such table"):
            run(place, missing)
    with pytest.raises(StorageError, match="is no local path"):
        pack(PackConfig(source="s3://bucket/t.csv", output=str(place.parent / "out")))


@pytest.mark.parametrize("cut", [0, 3, 40, -200, -1])
def test_parquet_that_is_cut_or_damaged(place, cut):
    parquet.write_table(pa.table({"image": ["a.png"] * 50, "caption": ["x"] * 50}), place / "t.parquet")
    data = (place / "t.parquet").read_bytes()
    (place / "t.parquet").write_bytes(data[:cut])
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as Parquet") as caught:
        run(place, "t.parquet")
    assert "\n" not in caught.value.message
    (place / "t.parquet").write_bytes(data[:4] + bytes(100) + data[104:])
    with pytest.raises(DataError):
        run(place, "t.parquet")


@pytest.mark.parametrize(("free", "told"), [(2 << 30, DataError), (1 << 29, SetupError)])
@pytest.mark.parametrize("where", ["__init__", "iter_batches"])
def test_want_of_memory_is_the_tables_fault_only_where_there_is_plenty(place, monkeypatch, free, told, where):
    def fails(*_args, **_options):
        raise pa.ArrowMemoryError("malloc of size 137438953472 failed")

    parquet.write_table(pa.table({"image": ["a.png"], "caption": ["x"]}), place / "t.parquet")
    monkeypatch.setattr(parquet.ParquetFile, where, fails)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.raises(told, match=r"t\.parquet") as caught:
        run(place, "t.parquet")
    assert ("more memory" in caught.value.remedy) == (told is SetupError)


def test_skipping_counts_by_reason_and_fills_the_shards(place):
    (place / "html.jpg").write_text("<html>")
    (place / "t.csv").write_text(
        "image,caption\na.png,x\nz.png,x\ny.png,x\nhtml.jpg,x\nb.png,\na.png,again\nd,x,y\nsub/c.png,c\n../d.png,d\n"
    )
    summary = run(place, "t.csv", on_error="skip", samples_per_shard=2)
    assert list(samples(place)) == ["a", "sub/c", "d"]
    assert (summary.pictures, summary.shards) == (3, 2)
    expected = {"missing_file": 2, "not_an_image": 1, "no_caption": 1, "duplicate_key": 1, "bad_row": 1}
    assert {reason: skipped.count for reason, skipped in summary.skipped.items()} == expected
    assert "missing_file: 2, first: " in str(summary)
    assert "t.csv:3 names" in str(summary)
    (place / "sub" / "c.png").unlink()
    with pytest.raises(DataError, match=r"holds shards that this table does not give: 00001\.tar"):
        run(place, "t.csv", on_error="skip", samples_per_shard=2)


def test_where_nothing_is_usable_it_is_an_error(place):
    (place / "t.csv").write_text("image,caption\ny.png,x\nz.png,x\n")
    with pytest.raises(DataError, match=r"no picture can be used \(missing_file: 2\); .*y\.png, which is not there"):
        run(place, "t.csv", on_error="skip")


def test_without_pyarrow_the_remedy_is_told(place, monkeypatch):
    parquet.write_table(pa.table({"image": ["a.png"], "caption": ["x"]}), place / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pipeline.data.parquet", raising=False)
    with pytest.raises(SetupError) as caught:
        run(place, "t.parquet")
    assert caught.value.remedy == "pip install 'lathe-ldm[parquet]'"
    (place / "t.csv").write_text("image,caption\na.png,x\n")
    assert run(place, "t.csv").pictures == 1


@pytest.mark.alone
def test_memory_is_that_of_a_shard_and_a_row_group(place):
    noise = PICTURES[0] + np.random.default_rng(0).bytes(1 << 20)
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with parquet.ParquetWriter(place / "t.parquet", schema, use_dictionary=False, compression="none") as writer:
        for i in range(20):
            rows = [noise + bytes([i, j]) for j in range(10)]
            writer.write_table(pa.table({"image": rows, "caption": ["x"] * 10}, schema=schema))
    program = """
import sys
from pipeline.config import PackConfig
from pipeline.data import parquet
from pipeline.data.pack import pack
from pipeline.operate.bench.peak import peak_bytes
before = peak_bytes()
pack(PackConfig(source=sys.argv[1], output=sys.argv[2], samples_per_shard=10))
print((peak_bytes() - before) >> 20)
"""
    command = [sys.executable, "-c", program, str(place / "t.parquet"), str(place.parent / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(list((place.parent / "out").glob("*.tar"))) == 20
    assert int(done.stdout) < 120  # MiB, of 200


def test_contained_keys():
    assert contained_key("/etc/./a.b.png", is_file=True) == "etc/a_b"
    assert contained_key("../../x\n\udce9", is_file=False) == "x__"
    assert contained_key("img.v1", is_file=False) == "img_v1"
    for nothing in ("", "..", "/", "./."):
        with pytest.raises(ValueError, match="empty"):
            contained_key(nothing, is_file=False)
