from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from support import fingerprint

from pipeline.data.manifest import (
    Block,
    BucketRange,
    Fingerprint,
    Receipt,
    Reject,
    Statistics,
    content_hash,
    fold,
    load_manifest,
    load_receipt,
    shard_entry,
)
from pipeline.errors import DataError, StorageError
from pipeline.storage import open_store

FINGERPRINT = fingerprint()


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
        "statistics": Statistics(count=train * 4, sum=(0.1 * i, 2.0), sum_squares=(5.0, 6.0), sum_variance=(1.0, 2.0)),
        "rejects": (Reject(key="ké", reason="no_caption"),) * i,
        "environment": {"torch": "2", "threads": 1},
    }
    return Receipt(**{**values, **changes})


def folded(receipts):
    return fold(receipts, FINGERPRINT, autoencoder="s3://b/vae", latent_channels=2, downsampling_factor=8)


def test_records_read_back_what_they_wrote(tmp_path):
    store = open_store(str(tmp_path))
    manifest = folded([receipt(0), receipt(1)])
    store.write("manifest.json", manifest.to_bytes())
    store.write("00001.tar.receipt.json", receipt(1).to_bytes())
    assert load_manifest(f"{tmp_path}/manifest.json") == manifest
    assert load_receipt(store, manifest.shards[1].receipt) == receipt(1)
    assert load_receipt(store, manifest.shards[1].receipt).to_bytes() == receipt(1).to_bytes()


def test_the_manifest_is_the_same_bytes_for_equal_receipts():
    first = folded([receipt(0), receipt(1), receipt(2)])
    again = folded([Receipt.model_validate_json(receipt(i).to_bytes()) for i in range(3)])
    assert first.to_bytes() == again.to_bytes()
    assert (first.samples("train"), first.samples("holdout"), first.rejects) == (24, 6, {"no_caption": 3})
    assert (first.latent_side, first.context_length) == (8, 24)


def test_content_hash_depends_on_content_and_order():
    entries = [shard_entry(receipt(i)) for i in range(3)]
    hashes = {
        content_hash(entries),
        content_hash(entries[::-1]),
        content_hash(entries[:2]),
        content_hash([*entries[:2], shard_entry(receipt(2, sha256="f" * 64))]),
        content_hash([*entries[:2], shard_entry(receipt(2, train=7, holdout=3))]),
    }
    assert len(hashes) == 5


def test_statistics_are_those_of_the_posterior_samples():
    rng = np.random.default_rng(0)
    means, logvars = rng.normal(3, 2, (2, 6, 50)), rng.normal(-1, 0.5, (2, 6, 50))  # C, samples, elements
    parts = []
    for i in range(6):
        m, v = means[:, i], np.exp(logvars[:, i])
        sums = [tuple(x.sum(1).tolist()) for x in (m, m**2, v)]
        parts.append(Statistics(count=50, sum=sums[0], sum_squares=sums[1], sum_variance=sums[2]))
    parts.insert(2, Statistics(count=0, sum=(0.0, 0.0), sum_squares=(0.0, 0.0), sum_variance=(0.0, 0.0)))
    total = Statistics.total(parts)
    draws = means[..., None] + np.exp(logvars / 2)[..., None] * rng.standard_normal((*means.shape, 400))
    np.testing.assert_allclose(total.mean(), means.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(total.std(), draws.reshape(2, -1).std(1), rtol=5e-3)
    assert Statistics.total(parts[::-1]) == total


def test_ranges_of_a_split():
    assert receipt(0).ranges("train") == [(0, 8)]
    assert receipt(0).ranges("holdout") == [(8, 10)]
    assert receipt(0, train=0).ranges("train") == []


def test_empty_shards_are_listed_and_nothing_to_train_on_is_an_error():
    nothing = Statistics(count=0, sum=(0.0, 0.0), sum_squares=(0.0, 0.0), sum_variance=(0.0, 0.0))
    empty = receipt(1, buckets=(), blocks=(), statistics=nothing)
    assert [shard.samples("train") for shard in folded([receipt(0), empty]).shards] == [8, 0]
    with pytest.raises(DataError, match=r"no picture is left to train on \(no_caption: 1\)"):
        folded([empty])


def test_distinct_environments_are_listed_once():
    receipts = [receipt(i, environment={"threads": i % 2}) for i in range(4)]
    assert folded(receipts).environments == ({"threads": 0}, {"threads": 1})


@pytest.mark.parametrize("field", list(Fingerprint.model_fields))
def test_difference_names_the_field(field):
    value = getattr(FINGERPRINT, field)
    other = FINGERPRINT.model_copy(update={field: (0, 0, 0) if isinstance(value, tuple) else value * 2})
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
        (lambda t: t.update(format_version=99), "has format version 99, this Lathe reads up to 1"),
        (lambda t: t.pop("format_version"), "is not a manifest"),
        (lambda t: t.update(latent_side="eight"), "field latent_side"),
        (lambda t: t.update(surprise=1), "field surprise"),
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


def test_a_missing_manifest_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        load_manifest(f"{tmp_path}/manifest.json")


def test_neither_torch_nor_numpy_is_imported():
    code = "import sys, pipeline.data.manifest; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
