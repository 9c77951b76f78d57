from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fingerprint, provenance

from pipeline.data import fold as folding
from pipeline.data.fold import ExactSum, content_hash, fold, shard_entry
from pipeline.data.manifest import BucketRange, Receipt, Reject, Statistics, pack_hashes
from pipeline.errors import DataError

FINGERPRINT = fingerprint()
NOTHING = Statistics(count=0, sum=(0.0, 0.0), sum_squares=(0.0, 0.0), sum_variance=(0.0, 0.0))
NUMBERS = st.lists(st.floats(-1e30, 1e30), max_size=30)


def receipt(i: int, train: int = 8, holdout: int = 2, **changes) -> Receipt:
    values = {
        "shard": f"{i:05d}.tar",
        "source": f"{i:05d}.tar.gz",
        "source_bytes": 1000,
        "source_sha256": "5" * 64,
        "fingerprint": FINGERPRINT.digest(),
        "bytes": 2000 + i,
        "sha256": f"{i:064d}",
        "buckets": (BucketRange(bucket=(64, 64), train=(0, train), holdout=(train, train + holdout)),),
        "blocks": (),
        "keys": pack_hashes(range(train + holdout)),
        "statistics": Statistics(count=train * 4, sum=(0.1 * i, 2.0), sum_squares=(5.0, 6.0), sum_variance=(1.0, 2.0)),
        "rejects": (Reject(key="ké", reason="no_caption"),) * i,
        "environment": {"torch": "2", "threads": 1},
    }
    return Receipt(**{**values, **changes})


@given(NUMBERS, st.randoms(use_true_random=False))
def test_a_sum_is_exact_whatever_the_order(numbers, random):
    shuffled = random.sample(numbers, len(numbers))
    one, other = ExactSum(), ExactSum()
    for x, y in zip(numbers, shuffled, strict=True):
        one.add(x)
        other.add(y)
    exact = sum(map(Fraction, numbers), Fraction())
    assert one.value() == other.value() == math.fsum(numbers) == float(exact)


def test_a_sum_holds_what_floats_lose():
    total = ExactSum()
    for x in (1e16, 1.0, -1e16, 1e-20):
        total.add(x)
    assert total.value() == 1.0
    total.add(-1.0)
    assert total.value() == 1e-20


def test_the_manifest_is_the_same_bytes_for_equal_receipts():
    first = fold([receipt(0), receipt(1), receipt(2)], provenance())
    again = fold((Receipt.model_validate_json(receipt(i).to_bytes()) for i in range(3)), provenance())
    assert first.to_bytes() == again.to_bytes()
    assert (first.samples("train"), first.samples("holdout"), first.rejects) == (24, 6, {"no_caption": 3})
    assert json.loads(first.to_bytes())["shards"][1] == {
        "name": "00001.tar",
        "receipt": "00001.tar.receipt.json",
        "source": "00001.tar.gz",
        "buckets": [{"bucket": [64, 64], "train": 8, "holdout": 2}],
        "bytes": 2001,
        "sha256": f"{1:064d}",
    }


def test_what_is_told_of_the_whole_stands_in_the_manifest_and_comes_back():
    about = provenance(images=("a", "b"), shift_factor=0.1, scaling_factor=0.2, attribution="by me", shard_name_parts=2)
    manifest = fold([receipt(0)], about)
    assert (manifest.images, manifest.shift_factor, manifest.attribution) == (("a", "b"), 0.1, "by me")
    assert folding.provenance(manifest) == about
    assert fold([receipt(0)], folding.provenance(manifest)) == manifest


PART = st.tuples(st.integers(0, 50), *[st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))] * 3)


@given(st.lists(PART, max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_statistics_do_not_depend_on_the_order_of_the_shards(parts, random):
    receipts = [
        receipt(i, statistics=Statistics(count=n, sum=a, sum_squares=b, sum_variance=c))
        for i, (n, a, b, c) in enumerate(parts)
    ]
    wide = Statistics(count=1, sum=(0.0, 0.0), sum_squares=(1e16, 1e16), sum_variance=(1.0, 1.0))
    receipts.append(receipt(99, statistics=wide))
    one, other = (fold(order, provenance()) for order in (receipts, random.sample(receipts, len(receipts))))
    assert (one.mean, one.std) == (other.mean, other.std)
    assert (one.content_hash != other.content_hash) == (one.shards != other.shards)


def test_statistics_are_those_of_the_posterior_samples():
    rng = np.random.default_rng(0)
    means, logvars = rng.normal(3, 2, (2, 6, 50)), rng.normal(-1, 0.5, (2, 6, 50))  # C, samples, elements
    receipts = []
    for i in range(6):
        m, v = means[:, i], np.exp(logvars[:, i])
        sums = [tuple(x.sum(1).tolist()) for x in (m, m**2, v)]
        parts = Statistics(count=50, sum=sums[0], sum_squares=sums[1], sum_variance=sums[2])
        receipts.append(receipt(i, statistics=parts))
    receipts.insert(2, receipt(9, statistics=NOTHING))
    manifest = fold(receipts, provenance())
    draws = means[..., None] + np.exp(logvars / 2)[..., None] * rng.standard_normal((*means.shape, 400))
    np.testing.assert_allclose(manifest.mean, means.mean((1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, draws.reshape(2, -1).std(1), rtol=5e-3)


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


def test_empty_shards_are_listed_and_nothing_to_train_on_is_an_error():
    empty = receipt(1, buckets=(), keys="", statistics=NOTHING)
    manifest = fold([receipt(0), empty], provenance())
    assert [shard.samples("train") for shard in manifest.shards] == [8, 0]
    with pytest.raises(DataError, match=r"no picture of 64 px is left to train on \(no_caption: 1\)"):
        fold([empty], provenance())
    with pytest.raises(DataError, match="all are held out, or the shards are empty"):
        fold([], provenance())


def test_a_constant_channel_is_an_error():
    flat = Statistics(count=4, sum=(1.0, 4.0), sum_squares=(5.0, 4.0), sum_variance=(1.0, 0.0))
    with pytest.raises(DataError, match="latent channel 1 has the same value everywhere"):
        fold([receipt(0, statistics=flat)], provenance())


def test_distinct_environments_are_listed_once():
    receipts = [receipt(i, environment={"threads": i % 2}) for i in range(4)]
    assert fold(receipts, provenance()).environments == ({"threads": 0}, {"threads": 1})
