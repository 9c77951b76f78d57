"""A whole split in memory, in manifest order; damage by name."""

from pathlib import Path

import numpy as np
import pytest
from latent_shards import CHANNELS, FINGERPRINT, SIDE, moments, write_latents

from pipeline.data.manifest import RECEIPT_SUFFIX, Receipt
from pipeline.data.split_arrays import read_split
from pipeline.errors import DataError, StorageError

SIZES = [(20, 3), (0, 0), (1, 0), (33, 4), (0, 2), (16, 1)]


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return write_latents(tmp_path, SIZES, captions=3)


def test_a_split_is_read_in_manifest_order(latents: str) -> None:
    train, holdout = read_split(latents, "train"), read_split(latents, "holdout")
    assert train.keys == [f"{shard:05d}/{i:04d}" for shard, (n, _) in enumerate(SIZES) for i in range(n)]
    assert holdout.keys[:4] == ["00000/0020", "00000/0021", "00000/0022", "00003/0033"]
    for found in (train, holdout):
        assert found.captions == [f"{key} 0" for key in found.keys]
        np.testing.assert_array_equal(found.moments, [moments(key) for key in found.keys])
        assert found.moments.dtype == np.float16


@pytest.mark.parametrize("limit", [0, 1, 19, 20, 21, 69, 70, 500])
def test_a_limit_takes_the_first_ones(latents: str, limit: int) -> None:
    everything, some = read_split(latents, "train"), read_split(latents, "train", limit)
    assert (some.keys, some.captions) == (everything.keys[:limit], everything.captions[:limit])
    np.testing.assert_array_equal(some.moments, everything.moments[:limit])


def test_a_split_without_samples(tmp_path: Path) -> None:
    nothing = read_split(write_latents(tmp_path, [(5, 0)]), "holdout")
    assert nothing.moments.shape == (0, 2 * CHANNELS, SIDE, SIDE)
    assert nothing.keys == nothing.captions == []


def test_damage_is_named_and_other_blocks_do_not_mind(latents: str) -> None:
    folder = Path(latents).parent
    receipt = Receipt.model_validate_json((folder / f"00003.tar{RECEIPT_SUFFIX}").read_bytes())
    data = bytearray((folder / "00003.tar").read_bytes())
    data[receipt.blocks[2].offset + 700] ^= 1
    (folder / "00003.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"00003\.tar: samples 16 to 23 .* damaged") as error:
        read_split(latents, "train")
    assert "encode" in error.value.remedy
    assert len(read_split(latents, "holdout").keys) == 10
    assert len(read_split(latents, "train", limit=21).keys) == 21
    (folder / "00005.tar").unlink()
    with pytest.raises(StorageError, match=r"00005\.tar"):
        read_split(latents, "holdout")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_mode": "hashed"}, r"stored for text\.mode=hashed"),
        ({"buckets": ((2, 8), (4, 4), (8, 2))}, "several shapes"),
    ],
)
def test_latents_that_it_does_not_take_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    url = write_latents(tmp_path, [(9, 0)], fingerprint=FINGERPRINT.model_copy(update=changes))
    with pytest.raises(DataError, match=message) as error:
        read_split(url, "train")
    assert error.value.remedy
    assert "\n" not in error.value.message


def test_captions_may_be_stored_in_any_mode(tmp_path: Path) -> None:
    tower = FINGERPRINT.text_towers[0].model_copy(update={"width": 3, "pooled_width": 2})
    for number, changes in enumerate(
        ({"text_mode": "online"}, {"text_mode": "cached"}, {"text_mode": "cached", "text_padding": "trimmed"})
    ):
        mark = FINGERPRINT.model_copy(update={**changes, "text_towers": (tower,)})
        found = read_split(write_latents(tmp_path / str(number), [(9, 0)], fingerprint=mark, captions=2), "train")
        assert found.captions == [f"{key} 0" for key in found.keys]
        np.testing.assert_array_equal(found.moments, [moments(key) for key in found.keys])


def test_latents_of_another_shape_than_the_manifest_says(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(9, 0)], side=3)
    with pytest.raises(DataError, match=r"00000/0000.*float16 \[4, 3, 3\].*manifest says float16 \[4, 2, 2\]"):
        read_split(url, "train")
