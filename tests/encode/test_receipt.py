from __future__ import annotations

import hashlib
import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tar import members, read_npy
from pipeline.encode.receipt import EncodedSample, LatentShard, SourceIdentity

CHANNELS, SIDE = 2, 3


def sample(i: int) -> EncodedSample:
    rng = np.random.default_rng(i)
    return EncodedSample(
        key=f"s/{i:03d}",
        captions=("one", "two")[: 1 + i % 2],
        moments=rng.normal(0, 40, (2 * CHANNELS, SIDE, SIDE)).astype(np.float16),
        tokens=rng.integers(0, 49408, (1 + i % 2, 8)).astype(np.uint16),
        size=np.arange(6, dtype=np.int32) + i,
    )


def build(held_out: list[bool], block_samples: int):
    shard = LatentShard("src.tar", (24, 24), CHANNELS, block_samples)
    for i, holdout in enumerate(held_out):
        shard.add(sample(i), holdout=holdout)
    shard.reject("bad\udce9", "no_caption")
    return shard.finish("out.tar", SourceIdentity("src.tar", 99, "a" * 64), "f" * 64, {"threads": 1})


def keys(data) -> list[str]:
    return [name.partition(".")[0] for name, _, _ in members(data) if name.endswith(".latent.npy")]


@given(st.lists(st.booleans(), max_size=25), st.integers(1, 7))
@settings(deadline=None, max_examples=40)
def test_order_ranges_and_blocks(held_out, block_samples):
    data, receipt = build(held_out, block_samples)
    train = [f"s/{i:03d}" for i, held in enumerate(held_out) if not held]
    holdout = [f"s/{i:03d}" for i, held in enumerate(held_out) if held]
    assert keys(data) == train + holdout
    assert receipt.ranges("train") == ([(0, len(train))] if train else [])
    assert receipt.ranges("holdout") == ([(len(train), len(held_out))] if holdout else [])
    assert (receipt.bytes, receipt.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    at, offset = 0, 0
    for block in receipt.blocks:
        part = data[block.offset : block.offset + block.length]
        assert (block.first_sample, block.offset, block.crc32) == (at, offset, zlib.crc32(part))
        assert keys(part) == (train + holdout)[at : at + block.samples]
        assert 0 < block.samples <= block_samples
        assert at + block.samples <= len(train) or at >= len(train)
        at, offset = at + block.samples, offset + block.length
    assert (at, offset) == (len(held_out), len(data) - 1024)


def test_statistics_are_of_the_stored_training_values():
    data, receipt = build([False, True, False, False], 2)
    stored = [read_npy(data[at : at + n]) for name, at, n in members(data) if name.endswith(".latent.npy")]
    moments = np.stack(stored[:3]).astype(np.float64)
    mean, logvar = moments[:, :CHANNELS], moments[:, CHANNELS:].clip(-30, 20)
    statistics = receipt.statistics
    assert statistics.count == 3 * SIDE * SIDE
    np.testing.assert_allclose(statistics.sum, mean.sum((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.sum_squares, (mean**2).sum((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.sum_variance, np.exp(logvar).sum((0, 2, 3)), rtol=1e-12)
    assert logvar.max() == 20  # the clip took part


def test_rejects_are_plain_text():
    assert [(r.key, r.reason) for r in build([], 1)[1].rejects] == [("bad\\udce9", "no_caption")]


def test_an_empty_shard_has_a_receipt():
    data, receipt = build([], 4)
    assert (receipt.buckets, receipt.blocks, receipt.statistics.count, len(data)) == ((), (), 0, 1024)
