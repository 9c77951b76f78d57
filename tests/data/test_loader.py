"""The loader on hand-made latent shards: the same batches at any world size and from any step, and damage by name."""

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canned_s3 import Answer, Request, canned_s3, part_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_shards import BLOCK, CHANNELS, FINGERPRINT, LENGTH, SIDE, write_latents, write_shard
from loader_runs import data, digests, load, loader

from pipeline.data import planner
from pipeline.data.ahead import Ahead
from pipeline.data.fetch import BlockSource
from pipeline.data.manifest import RECEIPT_SUFFIX
from pipeline.data.split_arrays import read_split
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.storage import s3_client


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return write_latents(tmp_path, [(20, 3), (0, 0), (1, 0), (33, 4), (0, 2), (16, 1)], captions=3)


def test_batches_have_the_shapes_and_types_promised(latents: str) -> None:
    (batch,) = load(latents, 1, rank=1, world=2)
    assert batch.step == 0
    assert batch.positions.tolist() == [4, 5, 6, 7]
    assert (batch.moments.dtype, tuple(batch.moments.shape)) == (torch.float16, (4, 2 * CHANNELS, SIDE, SIDE))
    tokens = batch.text["clip"].tokens
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (4, LENGTH))
    assert (batch.weight.dtype, batch.weight.tolist()) == (torch.float32, [1.0] * 4)
    assert batch.datasets.tolist() == [0] * 4


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
    with loader(latents, start_step=5) as opened:
        assert opened.state_dict() == {"step": 5, "skipped": []}
        assert [next(opened).step for _ in range(3)] == [5, 6, 7]
        state = opened.state_dict()
    assert state == {"step": 8, "skipped": []}
    assert digests([load(latents, 2, start=state["step"])]) == digests([load(latents, 10)])[8:]


def test_captions_are_drawn_by_seed_epoch_and_key(latents: str) -> None:
    def drawn(seed: int) -> dict[tuple[int, str], int]:
        found: dict[tuple[int, str], int] = {}
        for number, batch in enumerate(load(latents, 350, seed=seed)):
            for place, (key, tokens) in enumerate(zip(batch.keys, batch.text["clip"].tokens, strict=True)):
                found[(number * 8 + place) // 70, key] = int(tokens[0])  # the first token is the caption's number
        return found

    first, other = drawn(1), drawn(2)
    counts = Counter(first.values())
    assert len(first) == 2800
    assert all(abs(counts[caption] - 2800 / 3) < 5 * (2800 * 2 / 9) ** 0.5 for caption in range(3))
    assert 0.2 < np.mean([first[place] == other[place] for place in first]) < 0.47
    assert 0.2 < np.mean([first[0, key] == first[1, key] for _, key in first]) < 0.47


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_bounded_by_the_window(tmp_path: Path, workers: int) -> None:
    url = write_latents(tmp_path, [(400, 0)] * 6)
    most = 0
    with loader(url, global_batch=4, window=32, workers=workers) as opened:
        for _ in range(620):  # into the second epoch
            next(opened)
            most = max(most, opened.counts["blocks_held"] * BLOCK)
    ahead = 32 if workers else 0
    assert 4 * 32 <= most <= 4 * (32 + 2 * BLOCK + ahead)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (1, 0), (2, 2)])
def test_each_byte_is_read_once_an_epoch(tmp_path: Path, world: int, workers: int) -> None:
    """Over all ranks; but for a block that two ranks share, where their runs meet."""
    url = write_latents(tmp_path, [(403, 0)] * 6)
    total = sum((tmp_path / f"{i:05d}.tar").stat().st_size - 1024 for i in range(6))
    shared = total // (6 * 51)
    read = blocks = requests = 0
    for rank in range(world):
        with loader(url, global_batch=4, window=32, rank=rank, world_size=world, workers=workers) as opened:
            for _ in range(565):  # of 604 steps an epoch, as some are read ahead
                next(opened)
            counts = opened.counts
        read, blocks, requests = (
            read + counts["bytes_read"],
            blocks + counts["blocks_read"],
            requests + counts["requests"],
        )
    assert blocks <= 6 * 51 + world - 1
    assert 0.93 * total < read <= total + 1.1 * shared * (world - 1)
    assert requests < blocks / 2  # neighbours are read together


def test_what_a_start_reads_first_is_what_it_needs_first(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(400, 0)] * 6)
    with loader(url, global_batch=4, window=128, workers=0) as opened:
        next(opened)
        assert opened.counts["blocks_read"] <= 4
        for _ in range(8):
            next(opened)
        assert opened.counts["blocks_read"] <= 4 * 9


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
        ({"text_mode": "braille"}, r"stored for text\.mode=braille"),
    ],
)
def test_latents_that_it_cannot_read_are_refused(tmp_path: Path, changes, message: str) -> None:
    url = write_latents(tmp_path, [(9, 0)], fingerprint=FINGERPRINT.model_copy(update=changes))
    with pytest.raises(DataError, match=message) as error:
        load(url, 1)
    assert error.value.remedy
    assert "\n" not in error.value.message


def test_errors_end_the_loader_and_its_threads(latents: str) -> None:
    before = threading.active_count()
    damage(latents, "00003.tar", lambda data: bytearray(len(data)))
    opened = loader(latents)
    with pytest.raises(DataError):
        list(islice(opened, 10))
    assert threading.active_count() == before
    assert list(opened) == []
    opened.close()


def test_closing_in_the_middle_leaves_no_thread(latents: str) -> None:
    before = threading.active_count()
    opened = loader(latents)
    next(opened)
    assert threading.active_count() > before
    opened.close()
    opened.close()
    assert threading.active_count() == before


def test_fewer_samples_than_a_batch(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(2, 0), (1, 1)])
    batches = load(url, 3)
    assert Counter(key for batch in batches for key in batch.keys) == dict.fromkeys(read_split(url, "train").keys, 8)
    assert [batch.epochs.tolist()[0] for batch in batches] == [0, 2, 5]


def test_a_world_size_that_does_not_divide_the_batch_is_refused(latents: str) -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        load(latents, 1, world=3)


BUCKETS = ((4, 4), (4, 8), (8, 4))
MARK = FINGERPRINT.model_copy(update={"buckets": BUCKETS, "flip": True})


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Several picture sizes, captions, mirrored latents; uneven and empty shards; a stream smaller than a batch."""
    shards = {
        "one": [{BUCKETS[0]: (21, 2), BUCKETS[1]: (5, 0)}, {}, {BUCKETS[0]: (1, 0), BUCKETS[2]: (19, 3)}],
        "two": [{BUCKETS[0]: (33, 1)}, {BUCKETS[1]: (12, 0), BUCKETS[2]: (7, 2)}],
    }
    return [
        write_latents(tmp_path_factory.mktemp(name), sizes, captions=2, fingerprint=MARK, prefix=name)
        for name, sizes in shards.items()
    ]


@pytest.fixture(scope="module")
def one_after_another() -> dict[tuple[str, float, int], list[str]]:
    """Batches of one process without threads, by mixing, share and window: what all others are held against."""
    return {}


@given(
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    workers=st.integers(0, 8),
    requests=st.integers(1, 4),
    steps_ahead=st.integers(1, 9),
    window=st.sampled_from([1, 3, 16]),
    mixing=st.sampled_from(["steps", "batches"]),
    share=st.sampled_from([1.0, 0.6]),
    cut=st.integers(0, 12),
    world_after=st.sampled_from([1, 2, 4, 12]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_sequence_is_always_the_same(
    two_sets, one_after_another, world, workers, requests, steps_ahead, window, mixing, share, cut, world_after
) -> None:
    """World sizes, threads, read-ahead, restarts at any step and at another world size: keys, places, every byte."""
    datasets, steps = data(*two_sets, batch=12, mixing=mixing, share=share), 12
    common = {"global_batch": 12, "window": window}
    setting = (mixing, share, window)
    if setting not in one_after_another:
        one_after_another[setting] = digests([load(datasets, steps, workers=0, **common)])
    expected = one_after_another[setting]
    how = {"workers": workers, "requests": requests, "steps_ahead": steps_ahead, **common}
    before = digests([load(datasets, cut, rank=r, world=world, **how) for r in range(world)])
    again = [load(datasets, steps - cut, start=cut, rank=r, world=world_after, **how) for r in range(world_after)]
    assert before + digests(again) == expected


@pytest.mark.parametrize("mixing", ["steps", "batches"])
def test_several_data_sets_and_sizes_in_one_run(two_sets, mixing: str) -> None:
    datasets = data(*two_sets, mixing=mixing)
    batches = load(datasets, 60)
    for batch in batches:
        height, width = batch.bucket
        assert tuple(batch.moments.shape) == (8, 2 * CHANNELS, height // 2, width // 2)
        assert [key[:3] for key in batch.keys] == [["one", "two"][d] for d in batch.datasets.tolist()]
        assert len(set(batch.datasets.tolist())) == (1 if mixing == "steps" else 2)
    seen = Counter((int(e), key) for b in batches for e, key in zip(b.epochs, b.keys, strict=True))
    assert set(seen.values()) == {1}
    everything = {key for epoch, key in seen if epoch == 0}
    assert everything == {key for url in two_sets for key in keys_of(url)}


def keys_of(url: str) -> list[str]:
    """Training samples, by a loader of their own: an epoch of each picture size."""
    datasets = data(url, batch=1)
    return [key for batch in load(datasets, datasets.samples, global_batch=1) for key in batch.keys]


def test_mirrored_latents_are_taken_for_half_of_the_draws(two_sets) -> None:
    batches = load(data(*two_sets), 200)
    drawn = [bool(m) for batch in batches for m in batch.mirrored]
    assert abs(sum(drawn) - 800) < 5 * 20
    plain = {
        key: moments
        for b in load(data(*two_sets), 60, flip=False)
        for key, moments in zip(b.keys, b.moments, strict=True)
    }
    for batch in batches[:60]:
        for key, mirrored, moments in zip(batch.keys, batch.mirrored, batch.moments, strict=True):
            assert torch.equal(moments, plain[key].flip(-1) if mirrored else plain[key])


def test_an_order_that_begins_later_is_the_same_order(latents: str) -> None:
    """A run that went on with other data: its steps go on counting, the order begins anew."""
    first, later = load(latents, 5), load(latents, 5, start=100, origin=100)
    assert [batch.step for batch in later] == [100, 101, 102, 103, 104]
    assert [batch.keys for batch in later] == [batch.keys for batch in first]


def spoil(latents: str) -> tuple[int, int]:
    """Damage block 2 of the shard 3. Returns its first sample and end."""
    receipt = json.loads((Path(latents).parent / ("00003.tar" + RECEIPT_SUFFIX)).read_text())
    damage(latents, "00003.tar", lambda data: flip(data, receipt["blocks"][2]["offset"] + 700))
    return 16, 24


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_block_may_be_skipped(latents: str, caplog, world: int) -> None:
    whole = load(latents, 27)
    first, end = spoil(latents)
    lost = {f"00003/{i:04d}" for i in range(first, end)}
    ranks, skipped = [], set()
    for rank in range(world):
        with loader(latents, rank=rank, world_size=world, on_damage="skip", max_skip_rate=0.9) as opened:
            ranks.append(list(islice(opened, 27)))
            assert opened.state_dict()["skipped"] in ([], [[0, 3, 2, 8]])
            skipped |= {tuple(skip) for skip in opened.skipped}
    assert skipped == {(0, 3, 2, 8)}
    assert "00003.tar: samples 16 to 23" in caplog.text
    assert "its 8 samples are skipped" in caplog.text
    assert caplog.text.count("samples 16 to 23") <= world
    for sound, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        weight = torch.cat([part.weight for part in parts]).tolist()
        keys = [key for part in parts for key in part.keys]
        assert weight == [0.0 if key in lost else 1.0 for key in sound.keys]
        assert keys == ["" if key in lost else key for key in sound.keys]
        moments = torch.cat([part.moments for part in parts])
        assert torch.equal(moments, sound.moments * torch.tensor(weight).half().reshape(-1, 1, 1, 1))


def test_a_skip_list_is_kept_when_the_block_is_sound_again(latents: str) -> None:
    whole = load(latents, 18)
    known = load(latents, 18, skipped=[[0, 3, 2, 8]], on_damage="fail")
    lost = {f"00003/{i:04d}" for i in range(16, 24)}
    assert [b.weight.tolist() for b in known] == [[0.0 if key in lost else 1.0 for key in b.keys] for b in whole]


@pytest.mark.parametrize("spoiled", ["receipt", "shard", "fewer samples"])
def test_a_shard_that_is_gone_may_be_skipped(latents: str, caplog, spoiled: str) -> None:
    folder = Path(latents).parent
    if spoiled == "receipt":
        (folder / ("00005.tar" + RECEIPT_SUFFIX)).write_text("{")
    elif spoiled == "shard":
        (folder / "00005.tar").unlink()
    else:
        write_shard(folder, 5, (12, 1), captions=3)
    with pytest.raises((DataError, StorageError), match=r"00005\.tar"):
        load(latents, 9)
    batches = load(latents, 9, on_damage="skip", max_skip_rate=0.5)
    weights = Counter(w for batch in batches for w in batch.weight.tolist())
    assert weights[0.0] in (16, 17, 18)  # 72 places of an epoch of 70
    assert {key[:5] for batch in batches for key in batch.keys} == {"", "00000", "00002", "00003"}
    assert "00005.tar" in caplog.text


def test_too_many_skips_fail_the_run_all_the_same(latents: str) -> None:
    spoil(latents)
    with pytest.raises(DataError, match=r"00003\.tar: samples 16 to 23 .* 8 of 70 samples .*max_skip_rate=0\.1 "):
        load(latents, 9, on_damage="skip", max_skip_rate=0.1)


def test_a_block_that_was_garbled_on_the_way_is_asked_for_again(latents: str, monkeypatch) -> None:
    from pipeline.storage.local import LocalStore

    whole, plain, spoiled = digests([load(latents, 9)]), LocalStore.read, set()

    def garbled(self, name, start=None, end=None):
        read = plain(self, name, start, end)
        if start is None or (name, start) in spoiled:
            return read
        spoiled.add((name, start))
        return read[:-1] if len(spoiled) % 2 else bytes(len(read))

    monkeypatch.setattr(LocalStore, "read", garbled)
    with loader(latents) as opened:
        assert digests([list(islice(opened, 9))]) == whole
        assert opened.counts["blocks_read_again"] >= 8


def test_the_cache_spares_the_storage(tmp_path: Path, latents: str) -> None:
    expected, counts = digests([load(latents, 9)]), []
    for _ in range(2):
        with loader(latents, cache=str(tmp_path / "cache"), workers=0) as opened:
            opened._source._cache.scan.join()  # before that nothing is kept
            assert digests([list(islice(opened, 9))]) == expected
            counts.append(opened.counts)
    assert counts[0]["blocks_read"] > 0
    assert (counts[1]["blocks_read"], counts[1]["bytes_read"]) == (0, 0)
    assert counts[1]["cached_blocks"] > 0
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(bytes(path.stat().st_size))
    assert digests([load(latents, 9, cache=str(tmp_path / "cache"))]) == expected


def test_a_skipped_shard_is_not_asked_for(latents: str) -> None:
    whole = load(latents, 18)
    with loader(latents, skipped=[[0, 3, -1, 33]], workers=0) as opened:
        known = list(islice(opened, 18))
        assert opened.counts["blocks_read_again"] == 0
        assert opened.skipped == [[0, 3, -1, 33]]
    for sound, batch in zip(whole, known, strict=True):
        assert batch.weight.tolist() == [0.0 if key.startswith("00003") else 1.0 for key in sound.keys]


def test_the_rate_of_skips_is_of_all_samples_whatever_the_world_size(tmp_path: Path) -> None:
    """One damaged block of many: no rank gives up, however many epochs pass, and however small its share is."""
    url = write_latents(tmp_path, [(400, 0)] * 4)
    receipt = json.loads((tmp_path / ("00001.tar" + RECEIPT_SUFFIX)).read_text())
    damage(url, "00001.tar", lambda data: flip(data, receipt["blocks"][7]["offset"] + 700))
    for rank in range(4):
        batches = load(url, 600, rank=rank, world=4, on_damage="skip", max_skip_rate=0.006)
        assert len(batches) == 600  # three epochs
    with pytest.raises(DataError, match="8 of 1600 samples"):
        load(url, 600, on_damage="skip", max_skip_rate=0.004)
    with pytest.raises(DataError, match="20 of 1600 samples"):  # what was skipped before counts
        load(url, 600, on_damage="skip", max_skip_rate=0.01, skipped=[[0, 2, 0, 12]])


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Counter[str]:
    """Every read of a block takes so long. Returns how many there were."""
    from pipeline.storage.local import LocalStore

    plain, reads = LocalStore.read, Counter[str]()

    def read(self, name, start=None, end=None):
        if start is not None:
            reads["blocks"] += 1
            time.sleep(seconds)
        return plain(self, name, start, end)

    monkeypatch.setattr(LocalStore, "read", read)
    return reads


def test_what_cannot_be_read_is_skipped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of a request: its neighbours are read without it."""
    from pipeline.storage.local import LocalStore

    url, plain = write_latents(tmp_path, [(400, 0)] * 4), LocalStore.read
    receipt = json.loads((tmp_path / ("00002.tar" + RECEIPT_SUFFIX)).read_text())
    bad = range(receipt["blocks"][17]["offset"] + 5, receipt["blocks"][17]["offset"] + 6)

    def read(self, name, start=None, end=None):
        if name == "00002.tar" and start is not None and start <= bad.start < end:
            raise StorageError("a sector of the disk", "mend it")
        return plain(self, name, start, end)

    monkeypatch.setattr(LocalStore, "read", read)
    for workers in (0, 2):
        with loader(url, window=64, on_damage="skip", max_skip_rate=0.5, workers=workers) as opened:
            for _ in range(210):
                next(opened)
            assert opened.skipped == [[0, 2, 17, 8]]
            assert opened.counts["requests"] < opened.counts["blocks_read"] / 2


@pytest.mark.parametrize("start", [0, 60, 150])
def test_a_damaged_block_fails_in_the_step_that_needs_it(tmp_path: Path, start: int) -> None:
    """Not earlier, with the neighbours that are read in the same request: every step before it is good."""
    url = write_latents(tmp_path, [(400, 0)] * 4)
    needs = {key: batch.step for batch in load(url, 200, window=64) for key in batch.keys}
    receipt = json.loads((tmp_path / ("00002.tar" + RECEIPT_SUFFIX)).read_text())
    number = max(range(50), key=lambda b: min(needs[f"00002/{i:04d}"] for i in range(8 * b, 8 * b + 8)))
    damage(url, "00002.tar", lambda data: flip(data, receipt["blocks"][number]["offset"] + 700))
    first = min(needs[f"00002/{i:04d}"] for i in range(8 * number, 8 * number + 8))
    assert first > 150
    with loader(url, window=64, start_step=start) as opened:
        steps = [next(opened).step for _ in range(first - start)]
        assert steps[-1] == first - 1
        with pytest.raises(DataError, match="damaged"):
            next(opened)


def test_who_waits_is_let_go_when_another_thread_closes(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.5)
    opened, found = loader(latents), []
    waiting = threading.Thread(target=lambda: found.append(list(islice(opened, 9))))
    waiting.start()
    time.sleep(0.1)
    opened.close()
    waiting.join(5)
    (batches,) = found
    assert len(batches) <= 1  # which was under way


def test_closing_does_not_read_what_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, reads = write_latents(tmp_path, [(400, 0)] * 4), slow(monkeypatch, 0.2)
    with loader(url, requests=2, window=64, global_batch=64):
        time.sleep(0.3)
        begun = time.monotonic()
    assert time.monotonic() - begun < 1
    assert reads["blocks"] <= 6
    time.sleep(0.4)
    assert reads["blocks"] <= 6


def test_a_loader_that_nobody_holds_ends_its_threads(latents: str) -> None:
    before = threading.active_count()
    opened = loader(latents)
    next(opened)
    del opened
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.alone
def test_an_interpreter_that_ends_does_not_wait_for_reads(latents: str) -> None:
    script = f"""
import time
from pipeline.config import DataSetConfig
from pipeline.data import loader
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.storage.local import LocalStore
loader._LAST_REQUESTS_SECONDS /= 20
plain = LocalStore.read
def read(self, name, start=None, end=None):
    time.sleep(0 if start is None else 30)
    return plain(self, name, start, end)
LocalStore.read = read
data = open_datasets([DataSetConfig(manifest={latents!r})], global_batch=8)
opened = LatentLoader(data, global_batch=8, seed=0, window=4)
time.sleep(0.5)
print("end", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "end\n"
    assert child.wait(10) == 0
    child.stdout.close()


def test_what_is_done_to_a_batch_does_not_touch_the_next(latents: str) -> None:
    expected = digests([load(latents, 9, workers=0)])
    with loader(latents, workers=0) as opened:
        for digest in expected:
            batch = next(opened)
            assert digests([[batch]]) == [digest]
            for tensor in (batch.positions, batch.epochs, batch.moments, batch.datasets):
                tensor.zero_()


def test_requests_have_a_limit_and_blocks_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "REQUEST_BYTES", 20_000)
    url, sizes, plain = write_latents(tmp_path, [(400, 0)] * 4), list[int](), BlockSource._bytes

    def counting(self, at, first, last):
        data = plain(self, at, first, last)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(BlockSource, "_bytes", counting)
    with loader(url, window=64, global_batch=4, workers=0) as opened:
        for _ in range(60):
            next(opened)
        held = [len(ref.get().data.obj) for ref in opened._planner._alive.values()]
        block = max(len(ref.get().data) for ref in opened._planner._alive.values())
    assert 10_000 < max(sizes) <= max(20_000, block)
    assert max(held) <= block  # no block keeps its whole request in memory


def test_the_cache_may_be_half_full_or_wrong(tmp_path: Path) -> None:
    url = write_latents(tmp_path / "latents", [(400, 0)] * 2)
    cache, expected = tmp_path / "cache", digests([load(url, 100, window=64)])
    for change in (lambda path: path.unlink(), lambda path: path.write_bytes(bytes(path.stat().st_size))):
        with loader(url, window=64, cache=str(cache), workers=0) as opened:
            opened._source._cache.scan.join()
            assert digests([list(islice(opened, 100))]) == expected
            assert opened.counts["blocks_read_again"] == 0
        kept = sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000)
        assert len(kept) == 100
        for path in kept[::2]:
            change(path)
    with loader(url, window=64, cache=str(cache), workers=0) as opened:
        opened._source._cache.scan.join()
        assert digests([list(islice(opened, 100))]) == expected
        assert (opened.counts["cached_blocks"], opened.counts["blocks_read"]) == (50, 50)
    with loader(url, window=64, cache=str(cache), workers=0) as opened:
        opened._source._cache.scan.join()
        list(islice(opened, 100))
        assert opened.counts["blocks_read"] == 0  # what was wrong has been replaced


def test_who_waits_may_give_up_and_gets_the_same_batch_later(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, answers, read = load(latents, 3), threading.Event(), BlockSource._bytes

    def slow(self: BlockSource, *which: Any) -> bytes:
        assert answers.wait(60)
        return read(self, *which)

    monkeypatch.setattr(BlockSource, "_bytes", slow)
    with loader(latents) as opened:
        for _ in range(3):
            asked = iter([False, False, True])
            assert opened.take(lambda asked=asked: next(asked)) is None
            assert opened.state_dict()["step"] == 0
        answers.set()
        found = [opened.take(lambda: False) for _ in range(3)]
    assert digests([found]) == digests([expected])
    assert opened.take(lambda: False) is None  # closed


def test_a_start_before_the_order_begins_is_refused(latents: str) -> None:
    with pytest.raises(ConfigError, match="begins with step 5"):
        loader(latents, start_step=4, origin=5)


@pytest.mark.parametrize("name", ["00005.tar", "00005.tar.receipt.json", "manifest.json"])
def test_a_pipe_in_place_of_a_file_is_refused(latents: str, name: str) -> None:
    """Who opens one waits for its other end."""
    file = Path(latents).parent / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(StorageError, match=rf"{name} is no file"):
        load(latents, 10)


@pytest.mark.parametrize("change", [{"train": 10**30}, {"train": -1}])
def test_impossible_counts_are_refused(latents: str, change) -> None:
    manifest = json.loads(Path(latents).read_text())
    manifest["shards"][0]["buckets"][0] |= change
    Path(latents).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.*train"):
        data(latents)


@pytest.mark.parametrize(("field", "value"), [("std", 1e-300), ("std", 1e300), ("mean", 1e300)])
def test_statistics_that_float32_does_not_hold_are_refused(latents: str, field: str, value: float) -> None:
    manifest = json.loads(Path(latents).read_text())
    manifest[field][0] = value
    Path(latents).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=field):
        data(latents)


def test_a_receipt_of_another_fingerprint_is_refused(latents: str) -> None:
    path = Path(latents).parent / ("00003.tar" + RECEIPT_SUFFIX)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"00003\.tar: its receipt"):
        load(latents, 10)


def test_a_server_that_fails_often_changes_nothing(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy, broken off, another range, the whole shard: each block comes all the same."""
    monkeypatch.setattr(s3_client, "_MAX_DELAY_SECONDS", 0.01)
    numbers, failed = itertools.count(), set()

    def serve(request: Request) -> Answer:
        whole = (Path(latents).parent / request.path.rpartition("/")[2]).read_bytes()
        right, kind = part_of(whole, request), next(numbers) % 6
        failed.add(kind)
        if kind == 0:
            return Answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if kind == 1:
            return Answer(right.status, right.body[:-7], {**right.headers, "Content-Length": str(len(right.body))})
        if kind == 2 and request.range:
            return Answer(206, right.body, {"Content-Range": f"bytes 7-{len(right.body) + 6}/{len(whole)}"})
        return Answer(200, whole) if kind == 3 else right

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with canned_s3(serve) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with loader("s3://bucket/manifest.json") as opened:
            batches = list(islice(opened, 27))
            assert opened.counts["blocks_read_again"] == 0
    assert failed == set(range(6))
    assert digests([batches]) == digests([load(latents, 27)])


def test_giving_up_leaves_no_more_batches_ready_than_there_is_room_for() -> None:
    """`workers` + 1, whoever waited for one of them."""
    open_gate, made = threading.Event(), []

    def assemble(planned: Any) -> Any:
        open_gate.wait(20)
        made.append(planned)
        return planned

    ahead = Ahead(lambda step: step, assemble, 0, 8, 2)  # type: ignore[arg-type, return-value]
    for _ in range(5):
        assert ahead.take(lambda: True) is None
    open_gate.set()
    time.sleep(0.3)
    assert len(made) == 3
    assert [ahead.take() for _ in range(6)] == list(range(6))
    ahead.stop()
    ahead.join(2)
