from __future__ import annotations

import hashlib
import io
import itertools
import json
import tracemalloc
import zlib

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.manifest import Receipt, key_hash
from pipeline.data.tar import members, read_npy
from pipeline.encode.latent_shard import EncodedSample, LatentShard, LatentSums, SourceIdentity

CHANNELS = 2
BUCKETS = [(16, 32), (24, 24), (32, 16)]
SOURCE = SourceIdentity("src.tar", 99, "a" * 64, "e7")


def sample(i: int, bucket=BUCKETS[1], captions: int = 1, flip: bool = False, cached: bool = False) -> EncodedSample:
    rng = np.random.default_rng(i)
    shape = (2 * CHANNELS, bucket[0] // 8, bucket[1] // 8)

    def moments() -> np.ndarray:
        return rng.normal(0, 40, shape).astype(np.float16)

    def text() -> dict[str, np.ndarray]:
        if not cached:
            return {"tokens.clip": rng.integers(0, 49408, 8).astype(np.uint16)}
        towers = {f"text.{name}": rng.normal(size=(rng.integers(2, 9), 4)).astype(np.float16) for name in ("a", "b_1")}
        return {**towers, "pooled.b_1": rng.normal(size=6).astype(np.float16)}

    return EncodedSample(
        key=f"s/{i:03d}é",
        captions=tuple(f"caption {n}" for n in range(captions)),
        bucket=bucket,
        moments=moments(),
        flipped=moments() if flip else None,
        text=tuple(text() for _ in range(captions)),
        size=np.arange(6, dtype=np.int32) + i,
    )


def build(samples, block_samples: int) -> tuple[memoryview, Receipt]:
    shard = LatentShard("src.tar", CHANNELS, block_samples)
    for one, holdout in samples:
        shard.add(one, holdout=holdout)
    shard.reject("bad\udce9", "no_caption")
    return shard.finish("out.tar", SOURCE, "f" * 64, {"threads": 1})


def keys(data) -> list[str]:
    return [name.partition(".")[0] for name, _, _ in members(data) if name.endswith(".latent.npy")]


def in_order(samples) -> list[tuple[EncodedSample, bool]]:
    """What the file's order should be."""
    return sorted(samples, key=lambda pair: (pair[0].bucket, pair[1]))


KINDS = st.tuples(st.sampled_from(BUCKETS), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans())
SAMPLES = st.lists(KINDS, max_size=25).map(
    lambda kinds: [(sample(i, *kind[:4]), kind[4]) for i, kind in enumerate(kinds)]
)


@given(SAMPLES, st.integers(1, 7))
@settings(deadline=None, max_examples=60)
def test_order_ranges_blocks_and_hashes(samples, block_samples):
    data, receipt = build(samples, block_samples)
    ordered = in_order(samples)
    expected = [one.key for one, _ in ordered]
    assert keys(data) == expected
    assert list(receipt.hashes()) == [key_hash(key) for key in expected]
    assert receipt.samples() == len(samples)
    assert (receipt.bytes, receipt.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    at = 0
    for ranges in receipt.buckets:
        counts = [sum(one.bucket == ranges.bucket and held == split for one, held in samples) for split in (0, 1)]
        assert sum(counts) > 0
        assert ranges.train == (at, at + counts[0])
        assert ranges.holdout == (at + counts[0], at + sum(counts))
        at += sum(counts)
    assert [ranges.bucket for ranges in receipt.buckets] == sorted({one.bucket for one, _ in samples})
    borders = {edge for ranges in receipt.buckets for edge in (*ranges.train, *ranges.holdout)}

    at, offset = 0, 0
    for block in receipt.blocks:
        part = data[block.offset : block.offset + block.length]
        assert (block.first_sample, block.offset, block.crc32) == (at, offset, zlib.crc32(part))
        assert keys(part) == expected[at : at + block.samples]
        assert 0 < block.samples <= block_samples
        assert not borders & set(range(at + 1, at + block.samples))
        at, offset = at + block.samples, offset + block.length
        assert block.samples == block_samples or at in borders  # as few as can be
    assert (at, offset) == (len(samples), len(data) - 1024)


@given(SAMPLES)
@settings(deadline=None, max_examples=30)
def test_webdataset_reads_back_what_went_in(samples):
    data, _ = build(samples, 4)
    decode = webdataset.autodecode.Decoder([webdataset.autodecode.basichandlers])
    found = [
        decode(group) for group in group_by_keys(tar_file_expander([{"url": "out.tar", "stream": io.BytesIO(data)}]))
    ]
    assert [group["__key__"] for group in found] == [one.key for one, _ in in_order(samples)]
    for (one, _), group in zip(in_order(samples), found, strict=True):
        expected = {"latent.npy": one.moments, "size.npy": one.size}
        if one.flipped is not None:
            expected["latent_flip.npy"] = one.flipped
        for i, caption in enumerate(one.text):
            for name, values in caption.items():
                kind, tower = name.split(".")
                expected[f"{kind}{i}.{tower}.npy"] = values
        about = group.pop("json")
        assert about == {
            "captions": list(one.captions),
            "bucket": list(one.bucket),
            "source_shard": "src.tar",
            "source_key": one.key,
        }
        arrays = {name: value for name, value in group.items() if not name.startswith("__")}
        assert set(arrays) == set(expected)
        for name, values in expected.items():
            assert arrays[name].dtype == values.dtype
            np.testing.assert_array_equal(arrays[name], values)


@given(SAMPLES, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_the_same_samples_give_the_same_bytes_however_the_buckets_mix(samples, random):
    data, receipt = build(samples, 3)
    again, twin = build(samples, 3)
    assert (bytes(data), receipt) == (bytes(again), twin)
    queues = [list(run) for _, run in itertools.groupby(in_order(samples), lambda p: (p[0].bucket, p[1]))]
    mixed = []
    while queues := [queue for queue in queues if queue]:
        mixed.append(random.choice(queues).pop(0))
    again, twin = build(mixed, 3)
    assert (bytes(data), receipt) == (bytes(again), twin)


@given(SAMPLES)
@settings(deadline=None, max_examples=30)
def test_statistics_are_of_the_stored_training_values(samples):
    data, receipt = build(samples, 4)
    latents = [read_npy(data[at : at + n]) for name, at, n in members(data) if name.endswith(".latent.npy")]
    statistics, again = receipt.statistics, LatentSums(CHANNELS)
    for ranges in receipt.buckets:
        for moments in latents[slice(*ranges.train)]:
            again.add(ranges.bucket, moments)
    assert again.total() == statistics  # to the last bit: `lathe remove` needs it
    train = [one.moments.astype(np.float64).reshape(2 * CHANNELS, -1) for one, held_out in samples if not held_out]
    values = np.concatenate(train, axis=1) if train else np.zeros((2 * CHANNELS, 0))
    mean, logvar = values[:CHANNELS], values[CHANNELS:].clip(-30, 20)
    assert statistics.count == mean.shape[1]
    np.testing.assert_allclose(statistics.sum, mean.sum(1), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(statistics.sum_squares, (mean**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(statistics.sum_variance, np.exp(logvar).sum(1), rtol=1e-12)


def test_a_latents_layout_in_memory_does_not_matter():
    plain = sample(1)
    strided = np.asfortranarray(plain.moments)
    assert strided.strides != plain.moments.strides
    one, other = LatentSums(CHANNELS), LatentSums(CHANNELS)
    one.add(BUCKETS[1], plain.moments)
    other.add(BUCKETS[1], strided)
    assert one.total() == other.total()
    twin = EncodedSample(**{**vars(plain), "moments": strided})
    assert bytes(build([(plain, False)], 1)[0]) == bytes(build([(twin, False)], 1)[0])


def test_the_receipt_tells_the_source_and_rejects_in_plain_text():
    receipt = build([], 1)[1]
    assert [(r.key, r.reason) for r in receipt.rejects] == [("bad\\udce9", "no_caption")]
    told = (receipt.source, receipt.source_bytes, receipt.source_sha256, receipt.source_version)
    assert told == ("src.tar", 99, "a" * 64, "e7")
    assert (receipt.shard, receipt.fingerprint, receipt.environment) == ("out.tar", "f" * 64, {"threads": 1})
    assert Receipt.model_validate(json.loads(receipt.to_bytes())) == receipt


def test_an_empty_shard_has_a_receipt():
    data, receipt = build([], 4)
    assert (receipt.buckets, receipt.blocks, receipt.keys, receipt.statistics.count) == ((), (), "", 0)
    assert bytes(data) == bytes(1024)


@pytest.mark.parametrize("holdout_every", [0, 10])
def test_finishing_does_not_hold_the_shard_twice(holdout_every):
    bucket = (256, 256)
    one = sample(0, bucket)
    tracemalloc.start()
    try:
        shard = LatentShard("src.tar", CHANNELS, 16)
        for i in range(1000):
            shard.add(one, holdout=bool(holdout_every and i % holdout_every == 0))
        data, _ = shard.finish("out.tar", SOURCE, "f" * 64, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) > 10e6
    # a growing buffer is at most an eighth ahead, the held-out tenth is there twice for a moment
    assert peak < 1.4 * len(data)
