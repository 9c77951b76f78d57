"""Where samples are, by receipts that may say anything."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_shards import BLOCK, LENGTH, write_latents, write_shard
from support import fingerprint

from pipeline import storage
from pipeline.data.manifest import RECEIPT_SUFFIX, Manifest, Split, load_manifest, load_receipt
from pipeline.data.shard_plan import ShardPlan, load_plans
from pipeline.data.tar import members
from pipeline.errors import DataError

WIDE, SQUARE, TALL = (2, 8), (4, 4), (8, 2)
MARK = fingerprint(resolution=4, context_length=LENGTH, buckets=(WIDE, SQUARE, TALL))
SIZES = {WIDE: (19, 2), SQUARE: (0, 3), TALL: (8, 0)}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("latents"), [SIZES], fingerprint=MARK)


def plans(url: str, split: Split = "train") -> dict[tuple[int, int], ShardPlan]:
    return load_plans(storage.open_store(str(Path(url).parent)), load_manifest(url), 0, split)


@pytest.mark.parametrize(("split", "which"), [("train", 0), ("holdout", 1)])
def test_every_sample_of_every_bucket_is_in_the_block_that_is_told(latents: str, split: Split, which: int) -> None:
    found = plans(latents, split)
    assert list(found) == [bucket for bucket, counts in SIZES.items() if counts[which]]
    data = (Path(latents).parent / "00000.tar").read_bytes()
    before = {WIDE: 0, SQUARE: 21, TALL: 24}
    for bucket, plan in found.items():
        count = SIZES[bucket][which]
        assert plan.samples.sum() == count
        assert plan.samples[:-1].tolist() == [BLOCK] * (len(plan.samples) - 1)
        for sample in range(count):
            block, row = plan.locate(sample)
            part = data[plan.offset[block] : plan.offset[block] + plan.length[block]]
            keys = list(dict.fromkeys(name.split(".")[0] for name, _, _ in members(part)))
            number = before[bucket] + SIZES[bucket][0] * which + sample
            assert keys[row] == f"00000/{number:04d}"


def test_blocks_are_known_by_their_numbers_in_the_receipt_and_told_in_the_shards_samples(latents: str) -> None:
    plan, store = plans(latents)[TALL], storage.open_store(str(Path(latents).parent))
    receipt = load_receipt(store, "00000.tar" + RECEIPT_SUFFIX)
    (number,) = plan.numbers.tolist()
    block = receipt.blocks[number]
    assert plan.place(0) == f"samples 24 to 31 (bytes {block.offset} to {block.offset + block.length - 1})"
    assert (plan.crc32[0], plan.starts[0]) == (block.crc32, 0)


def test_a_plan_takes_few_bytes_a_sample(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(2000, 10)])
    (plan,) = plans(url).values()
    arrays = (plan.numbers, plan.starts, plan.samples, plan.offset, plan.length, plan.crc32)
    assert sum(array.nbytes for array in arrays) == 250 * 48  # blocks of 8 samples here, of 64 usually
    assert all(array.base is None or array.base.nbytes == 250 * 48 for array in arrays)  # and keep nothing else


def test_a_receipt_of_another_encoding_is_refused(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [SIZES], fingerprint=MARK)
    write_shard(tmp_path, 0, {**SIZES, TALL: (7, 1)}, mark=MARK)
    with pytest.raises(DataError, match=r"00000\.tar: its receipt is not the one") as error:
        plans(url)
    assert "lathe encode" in error.value.remedy


CHANGES: list[tuple[tuple[Any, ...], Any]] = [
    (("sha256",), "0"),
    (("blocks", 1, "samples"), 7),
    (("blocks", 1, "samples"), 0),
    (("blocks", 1, "first_sample"), 9),
    (("blocks", 1, "crc32"), -1),
    (("blocks", 1, "crc32"), 1 << 32),
    (("blocks", 1, "offset"), 1 << 70),
    (("blocks", 2, "length"), 1 << 40),
    (("blocks", 2, "length"), 0),
    (("blocks",), []),
    (("buckets", 0, "train"), [0, 18]),
    (("buckets", 0, "train"), [0, 1 << 70]),
    (("buckets", 2, "bucket"), [2, 8]),
    (("buckets",), []),
]


def change(url: str, place: tuple[Any, ...], value: Any) -> tuple[Manifest, storage.Store]:
    store = storage.open_store(str(Path(url).parent))
    tree = node = json.loads(store.read("00000.tar" + RECEIPT_SUFFIX))
    for name in place[:-1]:
        node = node[name]
    node[place[-1]] = value

    class Changed(type(store)):  # type: ignore[misc]
        def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
            return json.dumps(tree).encode()

    return load_manifest(url), Changed(store.url)


@pytest.mark.parametrize(("place", "value"), CHANGES)
def test_a_receipt_that_does_not_fit_is_refused(latents: str, place: tuple[Any, ...], value: Any) -> None:
    manifest, store = change(latents, place, value)
    with pytest.raises(DataError, match=r"00000\.tar"):
        load_plans(store, manifest, 0, "train")


PLACES = st.one_of(
    st.tuples(st.just("blocks"), st.integers(0, 3), st.sampled_from(["samples", "first_sample", "offset", "length"])),
    st.tuples(st.just("buckets"), st.integers(0, 2), st.sampled_from(["bucket", "train", "holdout"])),
    st.tuples(st.sampled_from(["blocks", "buckets", "keys", "statistics", "bytes"])),
)
VALUES = st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=3), st.lists, max_leaves=4)


@given(PLACES, VALUES)
def test_whatever_a_receipt_says_its_blocks_stay_in_the_shard(latents: str, place: tuple[Any, ...], value: Any) -> None:
    manifest, store = change(latents, place, value)
    try:
        found = load_plans(store, manifest, 0, "train")
    except DataError:
        return
    for bucket, plan in found.items():
        assert plan.samples.sum() == SIZES[bucket][0]
        assert (plan.offset >= 0).all()
        assert (plan.offset + plan.length <= manifest.shards[0].bytes).all()
