"""The loader on hand-made latent shards: the same batches at any world size and from any step, and damage by name."""

import hashlib
import json
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_shards import BLOCK, CHANNELS, FINGERPRINT, LENGTH, SIDE, write_latents, write_shard

from pipeline.data.loader import Batch, LatentLoader, read_split
from pipeline.data.manifest import RECEIPT_SUFFIX
from pipeline.errors import ConfigError, DataError, StorageError


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return write_latents(tmp_path, [(20, 3), (0, 0), (1, 0), (33, 4), (0, 2), (16, 1)], captions=3)


def load(url: str, steps: int, *, start: int = 0, rank: int = 0, world: int = 1, seed: int = 3) -> list[Batch]:
    with LatentLoader(
        url, global_batch=8, seed=seed, window=4, rank=rank, world_size=world, start_step=start
    ) as loader:
        return list(islice(loader, steps))


def digests(ranks: list[list[Batch]]) -> list[str]:
    """One hash of each global batch: keys, places, and every byte the network will see."""
    found = []
    for parts in zip(*ranks, strict=True):
        assert len({(part.step, part.epoch) for part in parts}) == 1
        text = repr((parts[0].step, parts[0].epoch))
        keys = [key for part in parts for key in part.keys]
        places = torch.cat([part.positions for part in parts]).tolist()
        arrays = [torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("moments", "tokens")]
        content = b"".join([repr((text, keys, places)).encode(), *(array.tobytes() for array in arrays)])
        found.append(hashlib.sha256(content).hexdigest())
    return found


def test_batches_have_the_shapes_and_types_promised(latents: str) -> None:
    (batch,) = load(latents, 1, rank=1, world=2)
    assert batch.step == 0
    assert batch.positions.tolist() == [4, 5, 6, 7]
    assert (batch.moments.dtype, tuple(batch.moments.shape)) == (torch.float16, (4, 2 * CHANNELS, SIDE, SIDE))
    assert (batch.tokens.dtype, tuple(batch.tokens.shape)) == (torch.int64, (4, LENGTH))


def test_every_epoch_holds_each_training_sample_once(latents: str) -> None:
    seen = Counter(key for batch in load(latents, 35) for key in batch.keys)
    assert len(seen) == 70
    assert set(seen.values()) == {4}  # 35 steps of 8 = 4 epochs of 70
    assert set(seen) == set(read_split(latents, "train").keys)


def test_every_sample_comes_with_its_own_bytes(latents: str) -> None:
    everything = read_split(latents, "train")
    rows = {key: row for row, key in enumerate(everything.keys)}
    for batch in load(latents, 9):
        for key, moments in zip(batch.keys, batch.moments, strict=True):
            assert np.array_equal(moments.numpy(), everything.moments[rows[key]])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_world_size_gives_the_same_global_batches(latents: str, world: int) -> None:
    expected = digests([load(latents, 25)])
    assert digests([load(latents, 25, rank=rank, world=world) for rank in range(world)]) == expected
    assert len(set(expected)) == 25


@pytest.mark.parametrize("start", [0, 1, 4, 8, 9, 17, 24])
def test_a_restart_at_any_step_and_world_size_goes_on_as_before(latents: str, start: int) -> None:
    expected = digests([load(latents, 25)])[start:]
    assert digests([load(latents, 25 - start, start=start, rank=rank, world=2) for rank in range(2)]) == expected


def test_the_state_is_the_next_step_whatever_was_read_ahead(latents: str) -> None:
    with LatentLoader(latents, global_batch=8, seed=3, window=4, start_step=5) as loader:
        assert loader.state_dict() == {"step": 5}
        assert [next(loader).step for _ in range(3)] == [5, 6, 7]
        state = loader.state_dict()
    assert state == {"step": 8}
    assert digests([load(latents, 2, start=state["step"])]) == digests([load(latents, 10)])[8:]


def test_captions_are_drawn_by_seed_epoch_and_key(latents: str) -> None:
    def drawn(seed: int) -> dict[tuple[int, str], int]:
        found: dict[tuple[int, str], int] = {}
        for number, batch in enumerate(load(latents, 350, seed=seed)):
            for place, (key, tokens) in enumerate(zip(batch.keys, batch.tokens, strict=True)):
                found[(number * 8 + place) // 70, key] = int(tokens[0])  # the first token is the caption's number
        return found

    first, other = drawn(1), drawn(2)
    counts = Counter(first.values())
    assert len(first) == 2800
    assert all(abs(counts[caption] - 2800 / 3) < 5 * (2800 * 2 / 9) ** 0.5 for caption in range(3))
    assert 0.2 < np.mean([first[place] == other[place] for place in first]) < 0.47
    assert 0.2 < np.mean([first[0, key] == first[1, key] for _, key in first]) < 0.47


def test_memory_is_bounded_by_the_window(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(400, 0)] * 6)
    most = 0
    with LatentLoader(url, global_batch=4, seed=0, window=32) as loader:
        for _ in range(620):  # into the second epoch
            next(loader)
            most = max(most, loader.cached_samples)
    assert 4 * 32 <= most <= 4 * (32 + 3 * BLOCK)


def test_each_block_is_read_once_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage.local import LocalStore

    url, reads, plain = write_latents(tmp_path, [(400, 0)] * 6), Counter(), LocalStore.read

    def counting(self, name, start=None, end=None):
        reads[name, start] += 1
        return plain(self, name, start, end)

    monkeypatch.setattr(LocalStore, "read", counting)
    with LatentLoader(url, global_batch=4, seed=0, window=32) as loader:
        for _ in range(590):  # of 600 steps an epoch, as some are read ahead
            next(loader)
    blocks = Counter({place: count for place, count in reads.items() if place[1] is not None})
    # 300 blocks; besides, each of the 4 runs shares a block with its neighbour
    assert len(blocks) >= 290
    assert sum(blocks.values()) <= 300 + 4
    assert all(count == 1 for (name, _), count in reads.items() if name.endswith(RECEIPT_SUFFIX))


def damage(url: str, shard: str, change) -> None:
    path = Path(url).parent / shard
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


def flip(data: bytearray, at: int) -> bytearray:
    data[at] ^= 1
    return data


def test_a_changed_byte_is_named(latents: str) -> None:
    receipt = json.loads((Path(latents).parent / ("00003.tar" + RECEIPT_SUFFIX)).read_text())
    block = receipt["blocks"][2]
    damage(latents, "00003.tar", lambda data: flip(data, block["offset"] + 700))
    with pytest.raises(DataError, match=r"00003\.tar: samples 16 to 23 .* damaged") as error:
        load(latents, 10)
    assert "encode" in error.value.remedy
    with pytest.raises(DataError, match=r"00003\.tar: samples 16 to 23"):
        read_split(latents, "train")
    assert len(read_split(latents, "holdout").keys) == 10  # in other blocks


def test_a_truncated_shard_is_named(latents: str) -> None:
    damage(latents, "00005.tar", lambda data: data[:20_000])
    with pytest.raises(DataError, match=r"00005\.tar: .* ends after \d+ of these"):
        load(latents, 10)


def test_a_missing_shard_is_named(latents: str) -> None:
    (Path(latents).parent / "00005.tar").unlink()
    with pytest.raises(StorageError, match=r"00005\.tar"):
        load(latents, 10)


def test_a_receipt_of_another_encoding_is_refused(latents: str) -> None:
    write_shard(Path(latents).parent, 3, (32, 4), captions=3)
    with pytest.raises(DataError, match=r"00003\.tar: its receipt"):
        load(latents, 10)


def test_arrays_of_another_shape_than_the_manifest_says_are_refused(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(9, 0)], side=3)
    with pytest.raises(DataError, match=r"00000/0000.*float16 \[4, 3, 3\].*manifest says float16 \[4, 2, 2\]"):
        load(url, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_mode": "cached"}, r"stored for text\.mode=cached"),
        ({"text_mode": "online"}, r"stored for text\.mode=online"),
        ({"buckets": ((2, 8), (4, 4), (8, 2))}, "several shapes"),
    ],
)
def test_latents_that_it_cannot_read_are_refused(tmp_path: Path, changes, message: str) -> None:
    url = write_latents(tmp_path, [(9, 0)], fingerprint=FINGERPRINT.model_copy(update=changes))
    for attempt in (lambda: load(url, 1), lambda: read_split(url, "train")):
        with pytest.raises(DataError, match=message) as error:
            attempt()
        assert error.value.remedy
        assert "\n" not in error.value.message


def test_errors_end_the_loader_and_its_threads(latents: str) -> None:
    before = threading.active_count()
    damage(latents, "00003.tar", lambda data: bytearray(len(data)))
    loader = LatentLoader(latents, global_batch=8, seed=3, window=4)
    with pytest.raises(DataError):
        list(islice(loader, 10))
    assert threading.active_count() == before
    loader.close()


def test_closing_in_the_middle_leaves_no_thread(latents: str) -> None:
    before = threading.active_count()
    loader = LatentLoader(latents, global_batch=8, seed=3, window=4)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(2, 0), (1, 1)])
    batches = load(url, 3)
    assert Counter(key for batch in batches for key in batch.keys) == dict.fromkeys(read_split(url, "train").keys, 8)
    assert [batch.epoch for batch in batches] == [0, 2, 5]


def test_a_world_size_that_does_not_divide_the_batch_is_refused(latents: str) -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        load(latents, 1, world=3)


def test_a_split_without_samples(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(5, 0)])
    nothing = read_split(url, "holdout")
    assert nothing.moments.shape == (0, 2 * CHANNELS, SIDE, SIDE)
    assert nothing.tokens.shape == (0, LENGTH)
    assert nothing.keys == nothing.captions == []
    with pytest.raises(DataError, match="no sample"):
        LatentLoader(url, global_batch=8, seed=3, window=4, split="holdout")


def test_a_split_is_read_in_manifest_order(latents: str) -> None:
    train, holdout = read_split(latents, "train"), read_split(latents, "holdout")
    sizes = {"00000": 20, "00002": 1, "00003": 33, "00005": 16}
    assert train.keys == [f"{shard}/{i:04d}" for shard, n in sizes.items() for i in range(n)]
    assert holdout.keys[:4] == ["00000/0020", "00000/0021", "00000/0022", "00003/0033"]
    assert train.captions[0] == "00000/0000 0"
    assert train.moments.shape == (70, 2 * CHANNELS, SIDE, SIDE)
    assert (train.tokens.dtype, train.tokens[:, 0].max()) == (np.uint16, 0)  # the first caption's


@pytest.mark.parametrize("limit", [0, 1, 19, 20, 21, 69, 70, 500])
def test_a_limit_takes_the_first_ones(latents: str, limit: int) -> None:
    everything, some = read_split(latents, "train"), read_split(latents, "train", limit)
    assert some.keys == everything.keys[:limit]
    assert np.array_equal(some.moments, everything.moments[:limit])
