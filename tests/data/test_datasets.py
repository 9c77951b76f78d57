"""Opening what a run is trained on: streams, groups, identity, and what does not fit together."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from latent_shards import FINGERPRINT, key, write_latents

from pipeline.config import DataSetConfig
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.fold import content_hash
from pipeline.data.manifest import MANIFEST, ShardEntry, load_manifest
from pipeline.data.order import VERSION, Order
from pipeline.errors import ConfigError, DataError, StorageError

SQUARE, TALL, WIDE = (4, 4), (8, 4), (4, 8)
BUCKETS = FINGERPRINT.model_copy(update={"buckets": (SQUARE, WIDE, TALL)})
FIRST = [{SQUARE: (20, 3), TALL: (10, 0)}, (0, 0), {TALL: (2, 1)}]  # 32 training samples
SECOND = [{SQUARE: (60, 5), WIDE: (36, 0)}, {SQUARE: (0, 2)}]  # 96


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("first"), FIRST, fingerprint=BUCKETS)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_latents(tmp_path_factory.mktemp("second"), SECOND, fingerprint=BUCKETS, prefix="other-")


def opened(*sources: dict, **options) -> DataSets:
    return open_datasets([DataSetConfig(**source) for source in sources], **{"global_batch": 8, **options})


def key_file(folder: Path, *keys: str) -> str:
    path = folder / f"keys-{len(list(folder.iterdir()))}.txt"
    path.write_text("".join(f"{one}\n" for one in keys))
    return str(path)


def test_streams_are_by_data_set_then_bucket_and_count_every_shard(first: str, second: str) -> None:
    found = opened({"manifest": first}, {"manifest": second})
    assert [(s.dataset, s.bucket, s.sizes.tolist()) for s in found.streams] == [
        (0, SQUARE, [20, 0, 0]),
        (0, TALL, [10, 0, 2]),
        (1, SQUARE, [60, 0]),
        (1, WIDE, [36, 0]),
    ]
    assert all(stream.sizes.dtype == np.int64 for stream in found.streams)
    assert [store.url for store in found.stores] == [str(Path(url).parent) for url in (first, second)]
    assert found.selected(0, 0, SQUARE) is None


def test_the_holdout_is_whole_whatever_share_and_keys_say(first: str, second: str, tmp_path: Path) -> None:
    found = opened(
        {"manifest": first, "share": 0.01},
        {"manifest": second, "keys": str(tmp_path / "not there")},
        split="holdout",
    )
    assert [(s.dataset, s.bucket, s.sizes.tolist()) for s in found.streams] == [
        (0, SQUARE, [3, 0, 0]),
        (0, TALL, [0, 0, 1]),
        (1, SQUARE, [5, 2]),
    ]
    assert found.selected(1, 0, SQUARE) is None


def test_without_weights_each_sample_is_drawn_as_often_as_any_other(first: str, second: str) -> None:
    found = opened({"manifest": first}, {"manifest": second})
    assert [group.weight for group in found.groups] == [5, 3, 15, 9]  # 20, 12, 60 and 36 samples
    assert {group.quotas for group in found.groups} == {(8,)}


def test_weights_are_parts_of_what_is_drawn(first: str, second: str) -> None:
    found = opened({"manifest": first, "weight": 3}, {"manifest": second, "weight": 1})
    # 3/4 * 20/32, 3/4 * 12/32, 1/4 * 60/96, 1/4 * 36/96
    assert [group.weight for group in found.groups] == [15, 9, 5, 3]


def test_mixed_batches_hold_of_every_data_set_that_has_the_bucket(first: str, second: str) -> None:
    sources = {"manifest": first, "weight": 3}, {"manifest": second, "weight": 1}
    found = opened(*sources, mixing="batches")
    by_bucket = {found.streams[group.streams[0]].bucket: group for group in found.groups}
    assert {bucket: (g.streams, g.quotas, g.weight) for bucket, g in by_bucket.items()} == {
        SQUARE: ((0, 2), (6, 2), 20),
        TALL: ((1,), (8,), 9),
        WIDE: ((3,), (8,), 3),
    }


@pytest.mark.parametrize("mixing", ["steps", "batches"])
def test_the_order_takes_what_was_opened(first: str, second: str, mixing: str) -> None:
    sources = {"manifest": first, "weight": 3, "share": 0.7}, {"manifest": second, "weight": 1}
    found = opened(*sources, mixing=mixing, global_batch=64)
    order = Order([s.sizes for s in found.streams], global_batch=64, seed=1, window=4, groups=found.groups)
    drawn = [found.streams[stream].dataset for step in range(400) for stream in order.batch(step).stream.tolist()]
    assert abs(np.mean(drawn) - 0.25) < 0.01


def test_the_share_of_each_shard_is_what_it_says(first: str) -> None:
    found = opened({"manifest": first, "share": 0.5})
    whole = opened({"manifest": first})
    for stream in found.streams:
        for shard, size in enumerate(stream.sizes.tolist()):
            if size:
                assert len(found.selected(0, shard, stream.bucket)) == size
    assert 0 < sum(s.samples for s in found.streams) < sum(s.samples for s in whole.streams)


def test_statistics_are_the_manifest_s_or_the_mixture_s(first: str, second: str) -> None:
    a, b = load_manifest(first), load_manifest(second)
    assert (opened({"manifest": first}).mean, opened({"manifest": first}).std) == (a.mean, a.std)
    mixed = opened({"manifest": first, "weight": 1}, {"manifest": second, "weight": 3})
    assert np.allclose(mixed.mean, 0.25 * np.array(a.mean) + 0.75 * np.array(b.mean))
    squares = 0.25 * (np.square(a.std) + np.square(a.mean)) + 0.75 * (np.square(b.std) + np.square(b.mean))
    assert np.allclose(mixed.std, np.sqrt(squares - np.square(mixed.mean)))


def test_progress_is_told_over_all_data_sets_that_need_it(first: str, second: str) -> None:
    told: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        told.append((done, total))

    opened({"manifest": first}, {"manifest": second}, progress=note)
    assert not told
    opened({"manifest": first, "share": 0.5}, {"manifest": second, "share": 0.5}, progress=note)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # a shard without samples needs no receipt


def test_identity_is_the_same_for_the_same_data(first: str, second: str, tmp_path: Path) -> None:
    keys = [key(0, i) for i in range(5)]
    sources = (
        {"manifest": first, "weight": 1, "share": 0.9, "keys": key_file(tmp_path, *keys)},
        {"manifest": second, "weight": 2},
    )
    moved = tmp_path / "moved"
    shutil.copytree(Path(first).parent, moved)
    same = (
        {
            "manifest": str(moved / MANIFEST),
            "weight": 2,
            "share": 0.9,
            "keys": key_file(tmp_path, *reversed(keys), keys[0]),
        },
        {"manifest": second, "weight": 4},
    )
    assert opened(*sources).identity == opened(*same).identity
    assert opened(*sources, global_batch=16).identity == opened(*sources).identity
    assert opened({"manifest": first}, mixing="batches").identity == opened({"manifest": first}).identity
    by_size = [{"manifest": first, "weight": 32}, {"manifest": second, "weight": 96}]
    assert opened(*by_size).identity == opened({"manifest": first}, {"manifest": second}).identity


def test_identity_differs_wherever_the_order_might(first: str, second: str, tmp_path: Path) -> None:
    one, other = {"manifest": first, "weight": 1}, {"manifest": second, "weight": 1}
    several = [
        opened(one, other),
        opened(other, one),
        opened(one),
        opened(other),
        opened({**one, "weight": 2}, other),
        opened({**one, "share": 0.9}, other),
        opened({**one, "share": 0.8}, other),
        opened(one, {**other, "share": 0.9}),
        opened({**one, "keys": key_file(tmp_path, key(0, 0), key(0, 1))}, other),
        opened({**one, "keys": key_file(tmp_path, key(0, 0), key(0, 2))}, other),
        opened(one, other, mixing="batches"),
        opened(one, other, split="holdout"),
    ]
    assert len({found.identity for found in several}) == len(several)


def test_identity_differs_for_another_version_of_the_order(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened({"manifest": first}).identity
    monkeypatch.setattr("pipeline.data.datasets.VERSION", VERSION + 1)
    assert opened({"manifest": first}).identity != before


def refused(kind: type[Exception], said: str, *sources: dict, **options) -> None:
    with pytest.raises(kind) as error:
        opened(*sources, **options)
    assert re.search(said, error.value.message), error.value.message
    assert error.value.remedy
    assert "\n" not in error.value.message


def test_what_a_run_file_cannot_ask_for_is_refused(first: str, second: str, tmp_path: Path) -> None:
    one, other = {"manifest": first}, {"manifest": second}
    refused(ConfigError, "datasets: there is none")
    refused(ConfigError, r"datasets\.1\.weight is not given", {**one, "weight": 1}, other)
    refused(ConfigError, "1 places cannot be shared by the 2 data sets", one, other, mixing="batches", global_batch=1)
    refused(ConfigError, r"datasets\.1\.share: 1e-06 leaves none of the 96 training", one, {**other, "share": 1e-6})
    listed = {**one, "share": 1e-6, "keys": key_file(tmp_path, key(0, 0))}
    refused(ConfigError, "leaves none of the listed ones among the 32 training samples", listed)
    refused(ConfigError, r"datasets\.2\.manifest: .* holds the same shards as datasets\.0\.manifest", one, other, one)


def test_a_copy_of_a_data_set_beside_it_is_refused(first: str, tmp_path: Path) -> None:
    shutil.copytree(Path(first).parent, tmp_path / "copy")
    refused(ConfigError, "holds the same shards", {"manifest": first}, {"manifest": str(tmp_path / "copy" / MANIFEST)})


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"autoencoder_weights": "x", "text_padding": "trimmed"}, "autoencoder_weights, text_padding"),
        ({"text_towers": (FINGERPRINT.text_towers[0].model_copy(update={"tokenizer": "u"}),)}, "text_towers"),
        ({"dtype": "float32"}, "dtype"),
        ({"text_precision": "bfloat16"}, "text_precision"),
        ({"autoencoder_config": "x"}, "autoencoder_config"),
        ({"normalisation": "x"}, "normalisation"),
        ({"text_mode": "online"}, "text_mode"),
    ],
)
def test_data_sets_of_another_encoding_are_refused(first: str, tmp_path: Path, changes, fields: str) -> None:
    url = write_latents(tmp_path, [(8, 0)], fingerprint=BUCKETS.model_copy(update=changes), prefix="x")
    refused(
        DataError, rf"{first} and {url} cannot be .*: they differ in {fields}$", {"manifest": first}, {"manifest": url}
    )


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("latent_channels", {"latent_channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}),
        ("downsampling_factor", {"downsampling_factor": 4}),
    ],
)
def test_latents_of_other_shapes_are_refused(first: str, second: str, tmp_path: Path, field: str, changes) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({**json.loads(Path(second).read_bytes()), **changes}))
    refused(DataError, f"they differ in {field}$", {"manifest": first}, {"manifest": str(tmp_path / MANIFEST)})


def test_what_may_differ_between_data_sets(first: str, tmp_path: Path) -> None:
    other = BUCKETS.model_copy(update={"buckets": (SQUARE,), "flip": True, "holdout": 0.2, "crop_rule": "random"})
    url = write_latents(tmp_path, [(8, 0)], fingerprint=other, prefix="x")
    assert len(opened({"manifest": first}, {"manifest": url}).streams) == 3


def test_a_manifest_that_is_missing_newer_or_without_samples_is_told(first: str, tmp_path: Path) -> None:
    where = tmp_path / MANIFEST
    refused(StorageError, str(where), {"manifest": first}, {"manifest": str(where)})
    tree = json.loads(Path(first).read_bytes())
    where.write_text(json.dumps({**tree, "format_version": 99}))
    refused(DataError, "has format version 99", {"manifest": str(where)})
    left = [shard for shard in tree["shards"] if not shard["buckets"]]
    told = content_hash([ShardEntry.model_validate(shard) for shard in left])
    where.write_text(json.dumps({**tree, "shards": left, "content_hash": told}))
    refused(DataError, "there is no sample to train on", {"manifest": str(where)})
    refused(DataError, "no sample is held out", {"manifest": str(where)}, split="holdout")
