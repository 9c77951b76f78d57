"""Held-out samples: which, and that ranks share them without loss, in batches of the same shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latent_shards import FACTOR, FINGERPRINT, moments, text, write_latents
from support import fingerprint

from pipeline.config import DataSetConfig
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.held_out import places, read_held_out
from pipeline.errors import ConfigError, DataError

WIDE, TALL = (2 * FACTOR, 4 * FACTOR), (4 * FACTOR, 2 * FACTOR)
TWO_SIZES = fingerprint(resolution=2 * FACTOR, context_length=4, buckets=(WIDE, TALL))


@pytest.fixture
def one(tmp_path) -> DataSets:
    return opened(write_latents(tmp_path / "one", [(20, 3), (0, 0), (1, 0), (33, 4), (0, 2), (16, 1)], captions=2))


@pytest.fixture
def several(tmp_path) -> DataSets:
    """Two data sets of two picture sizes each."""
    sizes = ([{WIDE: (3, 5), TALL: (4, 1)}] * 2, [{WIDE: (3, 2)}, {TALL: (4, 9)}])
    urls = [
        write_latents(tmp_path / name, own, fingerprint=TWO_SIZES, prefix=name)
        for name, own in zip("ab", sizes, strict=True)
    ]
    return opened(*urls)


def opened(*urls: str) -> DataSets:
    return open_datasets([DataSetConfig(manifest=url) for url in urls], global_batch=4)


def parts(datasets: DataSets, limit: int, world_size: int, batch_size: int = 3):
    return [
        read_held_out(datasets, limit, rank=rank, world_size=world_size, batch_size=batch_size)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_have_every_sample_once_and_batches_of_the_same_shapes(several, world_size):
    found, seen = parts(several, 100, world_size), {}
    shapes = [[(batch.bucket, *batch.moments.shape) for batch in batches] for batches in found]
    assert shapes == [shapes[0]] * world_size
    for batch in (batch for batches in found for batch in batches):
        assert len(batch.moments) <= 3
        for row, (name, weight) in enumerate(zip(batch.keys, batch.weight.tolist(), strict=True)):
            assert weight == float(name != "")
            if name:
                assert name not in seen
                seen[name] = int(batch.positions[row])
                np.testing.assert_array_equal(batch.moments[row], moments(name, *batch.moments.shape[2:]))
            else:
                assert not batch.moments[row].any()
    assert sorted(seen.values()) == list(range(5 + 1 + 5 + 1 + 2 + 9))


def test_what_a_sample_is_numbered_does_not_depend_on_the_ranks(several):
    def numbered(world_size):
        batches = (batch for batches in parts(several, 7, world_size) for batch in batches)
        pairs = (zip(batch.keys, batch.positions.tolist(), strict=True) for batch in batches)
        return sorted((number, name) for own in pairs for name, number in own if name)

    alone = numbered(1)
    assert len(alone) == 7
    assert numbered(2) == numbered(5) == alone
    assert {name[0] for _, name in alone} == {"a", "b"}


def test_samples_are_spread_over_all_that_there_are_and_none_was_trained_on(one):
    (found,) = places(one.manifests, 5).values()
    assert [(place.shard, place.number) for place in found] == [(0, 0), (0, 2), (3, 1), (3, 3), (4, 1)]
    (everything,) = places(one.manifests, 10_000).values()
    assert len(everything) == 10
    (batch,) = read_held_out(one, 10_000, rank=0, world_size=1, batch_size=16)
    assert batch.keys[:4] == ["00000/0020", "00000/0021", "00000/0022", "00003/0033"]
    (tower,) = batch.text.values()
    assert torch.equal(tower.tokens[3], torch.tensor(text(batch.keys[3], 0, FINGERPRINT)["tokens.clip"]).long())


def test_latents_without_held_out_samples_are_refused(tmp_path):
    datasets = opened(write_latents(tmp_path, [(8, 0)]))
    with pytest.raises(ConfigError, match=r"validation\.every: set, but no sample of the latents is held out") as told:
        places(datasets.manifests, 5)
    assert "images.holdout above 0" in str(told.value)


def test_damage_is_told_by_name(one, tmp_path):
    shard = tmp_path / "one" / "00003.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"00003\.tar: samples 33 to 36"):
        read_held_out(one, 100, rank=0, world_size=1, batch_size=4)
