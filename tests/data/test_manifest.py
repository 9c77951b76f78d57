from __future__ import annotations

import base64
import json
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import fingerprint, provenance

from pipeline.data.fold import fold
from pipeline.data.manifest import (
    Block,
    BucketCount,
    BucketRange,
    Fingerprint,
    Manifest,
    Receipt,
    Reject,
    ShardEntry,
    Statistics,
    Tower,
    canonical,
    key_hash,
    load_manifest,
    load_receipt,
    pack_hashes,
    parse_manifest,
    unpack_hashes,
)
from pipeline.errors import DataError, StorageError
from pipeline.storage import open_store

FINGERPRINT = fingerprint()
SIZES = WIDE, SQUARE, TALL = (48, 80), (64, 64), (80, 48)


def receipt(i: int, train: int = 8, holdout: int = 2, **changes) -> Receipt:
    values = {
        "shard": f"{i:05d}.tar",
        "source": f"{i:05d}.tar",
        "source_bytes": 1000,
        "source_sha256": "5" * 64,
        "fingerprint": FINGERPRINT.digest(),
        "bytes": 2000 + i,
        "sha256": f"{i:064d}",
        "buckets": (BucketRange(bucket=(64, 64), train=(0, train), holdout=(train, train + holdout)),),
        "blocks": (Block(first_sample=0, samples=train, offset=0, length=512, crc32=7),),
        "keys": pack_hashes(range(train + holdout)),
        "statistics": Statistics(count=train * 4, sum=(0.1 * i, 2.0), sum_squares=(5.0, 6.0), sum_variance=(1.0, 2.0)),
        "rejects": (Reject(key="ké", reason="no_caption"),) * i,
        "environment": {"torch": "2", "threads": 1},
    }
    return Receipt(**{**values, **changes})


def folded(receipts) -> Manifest:
    return fold(receipts, provenance())


def test_records_read_back_what_they_wrote(tmp_path):
    store = open_store(str(tmp_path))
    manifest = folded([receipt(0), receipt(1)])
    store.write("manifest.json", manifest.to_bytes())
    store.write("00001.tar.receipt.json", receipt(1).to_bytes())
    assert load_manifest(f"{tmp_path}/manifest.json") == manifest
    assert load_receipt(store, manifest.shards[1].receipt) == receipt(1)
    assert load_receipt(store, manifest.shards[1].receipt).to_bytes() == receipt(1).to_bytes()


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_manifest_written_shard_by_shard_has_the_bytes_of_the_whole(shards):
    buckets = tuple(BucketRange(bucket=size, train=(i, i + 1), holdout=(i + 1, i + 1)) for i, size in enumerate(SIZES))
    receipts = [receipt(0), receipt(1, buckets=()), receipt(2, source='a "shards": []', buckets=buckets)]
    manifest = folded(receipts).model_copy(update={"attribution": '\n "shards": []'})
    manifest = manifest.model_copy(update={"shards": manifest.shards[:shards]})
    assert manifest.to_bytes() == canonical(manifest.model_dump(mode="json"))


def test_a_shard_takes_little_memory_in_a_manifest():
    def receipts(count):
        for i in range(count):
            ranges = (
                BucketRange(bucket=(512, 320 + 64 * b), train=(1000 * b, 1000 * (b + 1)), holdout=(1000 * (b + 1),) * 2)
                for b in range(9)
            )
            yield receipt(i, buckets=tuple(ranges), rejects=())

    folded(receipts(2))
    tracemalloc.start()
    try:
        manifest = folded(receipts(200))
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        data = manifest.to_bytes()
        written = tracemalloc.get_traced_memory()[1] - kept
    finally:
        tracemalloc.stop()
    assert kept / 200 < 3500
    assert written < 3 * len(data)


def test_ranges_of_a_split():
    assert receipt(0).ranges("train") == [(0, 8)]
    assert receipt(0).ranges("holdout") == [(8, 10)]
    assert receipt(0, train=0).ranges("train") == []
    assert (receipt(0).samples(), receipt(0, train=0, holdout=0).samples()) == (10, 0)


def test_ranges_of_several_buckets_stand_in_file_order():
    buckets = (
        BucketRange(bucket=WIDE, train=(0, 3), holdout=(3, 4)),
        BucketRange(bucket=SQUARE, train=(4, 4), holdout=(4, 6)),
        BucketRange(bucket=TALL, train=(6, 9), holdout=(9, 9)),
    )
    one = receipt(0, buckets=buckets)
    assert one.ranges("train") == [(0, 3), (6, 9)]
    assert one.ranges("holdout") == [(3, 4), (4, 6)]
    assert one.samples() == 9


def test_samples_of_a_manifest_by_split_and_bucket():
    counts = [
        (BucketCount(bucket=TALL, train=3, holdout=1), BucketCount(bucket=WIDE, train=0, holdout=2)),
        (),
        (BucketCount(bucket=TALL, train=4, holdout=0),),
    ]
    shards = [
        ShardEntry(name=f"{i}.tar", receipt="r", source="s", buckets=one, bytes=0, sha256="")
        for i, one in enumerate(counts)
    ]
    manifest = folded([receipt(0)]).model_copy(update={"shards": tuple(shards)})
    assert (manifest.samples("train"), manifest.samples("holdout")) == (7, 3)
    assert manifest.buckets() == {TALL: 7}
    assert list(manifest.buckets("holdout").items()) == [(WIDE, 2), (TALL, 1)]
    assert manifest.latent_shape(TALL) == (4, 10, 6)


def test_the_latents_side_is_that_of_squares():
    square = folded([receipt(0)])
    assert (square.latent_side, square.context_length) == (8, 24)
    several = square.model_copy(update={"fingerprint": fingerprint(buckets=(WIDE, SQUARE, TALL))})
    with pytest.raises(DataError, match="several shapes") as error:
        _ = several.latent_side
    assert "images.buckets" in error.value.remedy


def test_the_context_is_the_longest_towers():
    towers = tuple(Tower(name=f"t{length}", tokenizer="t", context_length=length) for length in (16, 77, 24))
    assert fingerprint(text_towers=towers).context_length == 77


@given(st.lists(st.text(), max_size=20))
def test_hashes_of_keys_survive_the_way_to_text_and_back(keys):
    hashes = [key_hash(key) for key in keys]
    assert list(unpack_hashes(pack_hashes(hashes))) == hashes
    assert base64.b64decode(pack_hashes(hashes)) == b"".join(number.to_bytes(8, "big") for number in hashes)
    assert len(set(hashes)) == len(set(keys))


def test_a_keys_hash_stays_what_it_was():
    assert key_hash("00000/0001") == 0x9B8DE561AD2F9B15
    assert key_hash("\udce9") == 0xEB7CAC3C746B3455  # bytes that are not UTF-8, as tarfile names them


@pytest.mark.parametrize("field", list(Fingerprint.model_fields))
def test_difference_names_the_field(field):
    value = getattr(FINGERPRINT, field)
    changed = (0, 0, 0) if field == "background" else not value if isinstance(value, bool) else value * 2
    other = FINGERPRINT.model_copy(update={field: changed})
    assert FINGERPRINT.difference(other) == [field]
    assert FINGERPRINT.difference(FINGERPRINT) == []
    assert FINGERPRINT.digest() != other.digest()


def write(tmp_path, change) -> str:
    tree = json.loads(folded([receipt(0)]).to_bytes())
    change(tree)
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    return f"{tmp_path}/manifest.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("content_hash"), "field content_hash: is missing"),
        (lambda t: t["shards"][0].pop("sha256"), r"field shards\.0\.sha256: is missing"),
        (lambda t: t.update(format_version=99), "has format version 99, this Lathe reads version 2"),
        (lambda t: t.pop("format_version"), "is not a manifest"),
        (lambda t: t.update(format_version=1), "has format version 1, this Lathe reads version 2"),
        (lambda t: t.update(latent_channels="eight"), "field latent_channels"),
        (lambda t: t["fingerprint"]["text_towers"][0].pop("name"), r"field fingerprint\.text_towers\.0\.name"),
        (lambda t: t.update(surprise=1), "field surprise"),
        (lambda t: t.update(std=[1.0] * 3), "std has 3 numbers for 2 latent channels"),
        (lambda t: t.update(mean=[]), "mean has 0 numbers for 2 latent channels"),
        (lambda t: t.update(std=[1.0, 0.0]), r"field std\.1: .*greater than 0"),
        (lambda t: t.update(mean=[float("nan"), 0.0]), r"field mean\.0: .*finite"),
        (lambda t: t.update(latent_channels=0), "field latent_channels: .*greater than 0"),
        (lambda t: t.update(downsampling_factor=0), "field downsampling_factor: .*greater than 0"),
        (lambda t: t.update(shard_name_parts=0), "field shard_name_parts: .*greater than 0"),
        (lambda t: t.update(images=[]), "field images: .*at least 1 item"),
        (lambda t: t["fingerprint"].update(resolution=-5), r"field fingerprint\.resolution: .*greater than 0"),
        (lambda t: t["fingerprint"].update(buckets=[]), r"field fingerprint\.buckets: .*at least 1 item"),
        (lambda t: t["fingerprint"].update(buckets=[[0, 8]]), r"field fingerprint\.buckets\.0\.0: .*greater than 0"),
        (lambda t: t["fingerprint"].update(text_towers=[]), r"field fingerprint\.text_towers: .*at least 1 item"),
        (lambda t: t["shards"][0]["buckets"][0].update(train=-1), r"field shards\.0\.buckets\.0\.train: "),
    ],
)
def test_unusable_manifests_are_told_in_one_line(tmp_path, change, message):
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(write(tmp_path, change))
    assert caught.value.remedy
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("content", ["", "<html>", "[1]", '"x"', "\x00\xff"])
def test_what_is_no_manifest_is_told(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"is not JSON|is not a manifest"):
        load_manifest(f"{tmp_path}/manifest.json")


def test_a_manifest_from_elsewhere_is_named_as_told():
    assert parse_manifest(folded([receipt(0)]).to_bytes(), "run/step-1") == folded([receipt(0)])
    with pytest.raises(DataError, match="run/step-1 is not JSON"):
        parse_manifest(b"{", "run/step-1")


@pytest.mark.parametrize("keys", ["AAAA", "not base64", "AAAAAAAAAAA", "é"])
def test_a_receipt_with_damaged_hashes_is_told(tmp_path, keys):
    tree = {**json.loads(receipt(0).to_bytes()), "keys": keys}
    (tmp_path / "r").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="not a usable receipt: field keys") as error:
        load_receipt(open_store(str(tmp_path)), "r")
    assert "\n" not in error.value.message


def test_a_missing_manifest_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        load_manifest(f"{tmp_path}/manifest.json")


def test_neither_torch_nor_numpy_is_imported():
    code = "import sys, pipeline.data.manifest; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
