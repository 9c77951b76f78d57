"""LatentDataset in loops that are not ours: the same batches with any workers, ranks and restarts; its errors."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latent_shards import CHANNELS, LENGTH, SIDE, write_latents
from support import fingerprint
from torch.utils.data import DataLoader

from pipeline.data import LatentDataset
from pipeline.data.manifest import Tower, load_manifest
from pipeline.errors import ConfigError, DataError, SetupError
from pipeline.latents import unwhiten
from pipeline.storage import open_store

TOWERS = (
    Tower(name="clip_l", tokenizer="t", context_length=LENGTH, width=3),
    Tower(name="clip_g", tokenizer="t", context_length=LENGTH, width=5, pooled_width=2),
)
BUCKETS = ((2, 6), (4, 4), (6, 2))
Item = dict[str, Any]

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore:This DataLoader will create")]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """70 training samples of three picture sizes, with token ids, mirrored latents and three captions."""
    mark = fingerprint(SIDE * 2, LENGTH, buckets=BUCKETS, flip=True)
    shards = [{(4, 4): (20, 3), (2, 6): (7, 1)}, {}, {(6, 2): (5, 0)}, {(4, 4): (33, 4)}, {(2, 6): (5, 0)}]
    return write_latents(tmp_path_factory.mktemp("latents"), shards, captions=3, fingerprint=mark)


def dataset(url: Any, **changes: Any) -> LatentDataset:
    return LatentDataset(url, **{"global_batch": 8, "seed": 3, "window": 4, "caption_dropout": 0.3, **changes})


def take(stream: Any, steps: int) -> list[Item]:
    """So many items; what reads ahead is told to stop."""
    iterator = iter(stream)
    found = list(islice(iterator, steps))
    del iterator
    return found


def flat(item: Item) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in item.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in flat(value))
        elif isinstance(value, torch.Tensor):
            yield name, value


def digests(*ranks: list[Item]) -> list[str]:
    """One hash of each global batch, all contents included."""
    found = []
    for parts in zip(*ranks, strict=True):
        told = hashlib.sha256(repr((parts[0]["step"], [key for part in parts for key in part["keys"]])).encode())
        for name, _ in flat(parts[0]):
            whole = torch.cat([dict(flat(part))[name] for part in parts])
            told.update(repr((name, whole.dtype, whole.shape)).encode() + whole.numpy().tobytes())
        found.append(told.hexdigest())
    return found


@pytest.fixture(scope="module")
def expected(latents: str) -> list[str]:
    return digests(take(dataset(latents), 40))


def test_an_item_is_as_promised(latents: str) -> None:
    (item,) = take(dataset(latents, rank=1, world_size=2), 1)
    assert item["latents"].dtype == torch.float32
    assert item["latents"].shape[:2] == (4, CHANNELS)
    assert set(item["text"]) == {"clip"}
    assert set(item["text"]["clip"]) == {"tokens"}
    assert (item["text"]["clip"]["tokens"].dtype, *item["text"]["clip"]["tokens"].shape) == (torch.int64, 4, LENGTH)
    assert (item["size"].dtype, *item["size"].shape) == (torch.int32, 4, 6)
    assert item["weight"].tolist() == [1.0] * 4
    assert item["position"].tolist() == [4, 5, 6, 7]
    assert item["epoch"].tolist() == [0] * 4
    assert item["step"] == 0
    assert len(item["keys"]) == 4


@pytest.mark.parametrize("padding", ["full", "trimmed"])
def test_embeddings_come_by_tower(tmp_path: Path, padding: str) -> None:
    mark = fingerprint(SIDE * 2, LENGTH, text_mode="cached", text_padding=padding, text_towers=TOWERS)
    stream = dataset(write_latents(tmp_path, [(20, 0)], fingerprint=mark), caption_dropout=0.5)
    (item,) = take(stream, 1)
    more = {"mask"} if padding == "trimmed" else set()
    assert set(item["text"]["clip_l"]) == set(stream.empty_text["clip_l"]) == {"embeddings", *more}
    assert set(item["text"]["clip_g"]) == {"embeddings", "pooled", *more}
    for tower in TOWERS:
        found, empty = item["text"][tower.name]["embeddings"], stream.empty_text[tower.name]["embeddings"]
        assert found.shape == (8, LENGTH, tower.width)
        assert 0 < (found == empty).all(-1).all(-1).sum() < 8


def test_whitening_can_be_undone(latents: str) -> None:
    stream = dataset(latents, posterior="mean")
    (white,), (raw,) = take(stream, 1), take(dataset(latents, posterior="mean", normalisation="none"), 1)
    assert torch.allclose(unwhiten(white["latents"], stream.mean, stream.std), raw["latents"], atol=1e-5)
    assert stream.mean.tolist() == pytest.approx(load_manifest(latents).mean)


def test_the_autoencoders_own_scale(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(20, 0)], scaling_factor=0.5, shift_factor=0.25)
    (scaled,), (raw,) = (take(dataset(url, normalisation=kind), 1) for kind in ("scaling_factor", "none"))
    assert torch.equal(scaled["latents"], (raw["latents"] - 0.25) * 0.5)


def test_every_epoch_holds_each_sample_once(latents: str) -> None:
    stream = dataset(latents)
    assert (stream.samples, stream.steps_per_epoch) == (70, 9)
    seen = Counter(key for item in take(stream, 70) for key in item["keys"])
    assert len(seen) == 70
    assert set(seen.values()) == {8}  # 70 steps of 8 = 8 epochs of each picture size


@pytest.mark.parametrize("world", [2, 4, 8])
def test_any_world_size_gives_the_same_batches(latents: str, expected: list[str], world: int) -> None:
    ranks = [take(dataset(latents, rank=rank, world_size=world), 12) for rank in range(world)]
    assert digests(*ranks) == expected[:12]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.integers(0, 4),  # more alone: `test_each_number_of_workers`
    start=st.integers(0, 20),
    steps=st.integers(1, 12),
    world=st.sampled_from([1, 2, 4]),
    threads=st.integers(0, 2),
    prefetch=st.integers(1, 3),
)
def test_any_workers_give_the_same_batches(
    latents: str, expected: list[str], workers: int, start: int, steps: int, world: int, threads: int, prefetch: int
) -> None:
    ranks = []
    for rank in range(world):
        stream = dataset(latents, rank=rank, world_size=world, start_step=start, workers=threads)
        loader = DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=prefetch if workers else None)
        ranks.append(take(loader, steps))
    assert digests(*ranks) == expected[start : start + steps]


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_each_number_of_workers(latents: str, expected: list[str], workers: int) -> None:
    assert digests(take(DataLoader(dataset(latents), batch_size=None, num_workers=workers), 10)) == expected[:10]


def test_a_spawned_worker(latents: str, expected: list[str]) -> None:
    """Two at once: `test_workers_read_from_s3`."""
    loader = DataLoader(dataset(latents), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert digests(take(loader, 4)) == expected[:4]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_from_s3(latents: str, expected: list[str], s3_url: str, method: str) -> None:
    store = open_store(s3_url)
    for file in Path(latents).parent.iterdir():
        store.write(file.name, file.read_bytes())
    stream = dataset(f"{s3_url}/manifest.json")  # which has asked the server already, in this process
    loader = DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context=method)
    assert digests(take(loader, 4)) == expected[:4]
    assert digests(take(dataset(f"{s3_url}/manifest.json"), 4)) == expected[:4]


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_a_state_goes_on_at_another_world_size(latents: str, expected: list[str], stop: int) -> None:
    stream = dataset(latents)
    take(stream, stop)
    state = stream.state_dict()
    assert state == {"step": stop, "skipped": [], "order": state["order"]}
    ranks = []
    for rank in range(2):
        other = dataset(latents, rank=rank, world_size=2)
        other.load_state_dict(state)
        ranks.append(take(other, 3))
    assert digests(*ranks) == expected[stop : stop + 3]


@pytest.mark.parametrize("changes", [{"seed": 4}, {"global_batch": 4}, {"window": 5}, {"share": 0.9}])
def test_a_state_is_not_for_another_order(latents: str, changes: dict[str, Any]) -> None:
    state, arguments = dataset(latents).state_dict(), {"manifest": latents, "share": changes.get("share", 1.0)}
    other = dataset(arguments, **{name: value for name, value in changes.items() if name != "share"})
    with pytest.raises(ConfigError, match="the state is of other data"):
        other.load_state_dict(state)
    other.load_state_dict({"step": 2})
    assert take(other, 1)[0]["step"] == 2


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"step": -1},
        {"epoch": 1, "step": 1},
        *({"step": 1, "skipped": [skip]} for skip in ([1], [0, 0, 1], [0, 0, -2, 8], [1, 0, 0, 8], [0, 5, 0, 8])),
        *({"step": 1, "skipped": [skip]} for skip in ([0, 0, 999, 8], [0, 0, 0, 999], [0, 0, 0, True], [0, 0, 0.0, 8])),
        *({"step": step} for step in (True, "3", 3.0, 2**31, 10**30, None)),
        *({"step": 1, "order": order} for order in (True, 1.0, "1")),
        *({"step": 1, "workers": workers} for workers in (0, -1, True, "1")),
    ],
)
def test_what_is_no_state_is_refused(latents: str, state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="LatentDataset: ") as error:
        dataset(latents).load_state_dict(state)
    assert "command" not in error.value.remedy
    assert "\n" not in error.value.message


def test_a_states_numbers_may_be_numpys_and_torchs(latents: str, expected: list[str]) -> None:
    stream = dataset(latents)
    stream.load_state_dict({"step": torch.tensor(2), "skipped": [(np.int32(0), torch.tensor(3), 0, np.uint8(8))]})
    assert stream.state_dict()["skipped"] == [[0, 3, 0, 8]]
    stream.load_state_dict({"step": np.int64(2)})
    assert digests(take(stream, 2)) == expected[2:4]


def test_what_is_skipped_stays_so(latents: str) -> None:
    stream = dataset(latents, on_damage="skip")
    stream.load_state_dict({"step": 0, "skipped": [[0, 3, -1, 33], [0, 0, 1, 8]]})
    assert (torch.cat([item["weight"] for item in take(stream, 9)]) == 0).any()
    assert stream.state_dict()["skipped"] == [[0, 0, 1, 8], [0, 3, -1, 33]]


def test_iterating_again_goes_on(latents: str, expected: list[str]) -> None:
    loader = DataLoader(dataset(latents), batch_size=None)
    assert digests([*take(loader, 3), *take(loader, 2), *take(loader, 4)]) == expected[:9]


@pytest.mark.parametrize("other", ["iterate", "load"])
def test_an_iteration_whose_place_was_taken_says_so(latents: str, expected: list[str], other: str) -> None:
    stream = dataset(latents)
    first = iter(stream)
    next(first)
    if other == "iterate":
        second = iter(stream)
        assert digests([next(second)]) == expected[1:2]
    else:
        stream.load_state_dict({"step": 2})
    with pytest.raises(SetupError, match="taken its place"):
        next(first)
    assert digests(take(stream, 2)) == expected[2:4]


def test_closed_within_the_loop_it_ends(latents: str, expected: list[str]) -> None:
    stream, found = dataset(latents), []
    for item in stream:
        found.append(item)
        if len(found) == 3:
            stream.close()
    assert digests([*found, *take(stream, 1)]) == expected[:4]


@contextmanager
def held(lock: threading.Condition) -> Iterator[None]:
    """Another thread has the lock, as a loader's own may when its process is forked."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    try:
        yield
    finally:
        done.set()
        holder.join()


def test_workers_are_forked_from_a_process_that_reads(latents: str, expected: list[str]) -> None:
    for _ in range(6):
        stream = dataset(latents, workers=8, steps_ahead=64)
        reading = iter(stream)
        next(reading)
        with held(stream._loader._ahead._changed):
            loader = iter(DataLoader(stream, batch_size=None, num_workers=2, timeout=20))
        assert digests([next(loader) for _ in range(3)]) == expected[1:4]
        with pytest.raises(SetupError, match="taken its place"):
            next(reading)


def test_an_iteration_is_not_inherited(latents: str) -> None:
    stream = dataset(latents)
    reading = iter(stream)
    next(reading)
    told = multiprocessing.get_context("fork").SimpleQueue()

    def inherit(iterators: list[Iterator[Item]]) -> None:
        with pytest.raises(SetupError, match="before its process was forked"):
            next(iterators[0])
        stream.close()
        iterators.clear()
        told.put("ended")

    with held(stream._loader._ahead._changed):
        heir = multiprocessing.get_context("fork").Process(target=inherit, args=([reading],))
        heir.start()
    heir.join(20)
    heir.kill()
    assert (heir.exitcode, told.empty()) == (0, False)
    assert next(reading)["step"] == 1


def worker_states(stream: LatentDataset, workers: int, steps: int) -> list[dict[str, Any]]:
    """What a stateful DataLoader keeps: the state of each worker's copy after the last item that came from it."""
    copies = [InWorker(stream, number, workers) for number in range(workers)]
    for step in range(steps):
        copies[step % workers].next()
    return [copy.state() for copy in copies]


class InWorker:
    """A copy of a dataset that believes it is in a worker process."""

    def __init__(self, stream: LatentDataset, number: int, workers: int) -> None:
        self.stream, self._place = pickle.loads(pickle.dumps(stream)), (number, workers)  # noqa: S301
        self._iterator: Iterator[Item] | None = None

    def next(self) -> Item:
        if self._iterator is None:
            self._iterator = iter(self.stream)
        return self._within(lambda: next(self._iterator))

    def again(self) -> Item:
        self._iterator = None
        return self.next()

    def state(self) -> dict[str, Any]:
        return self._within(self.stream.state_dict)

    def load(self, state: dict[str, Any]) -> None:
        self._within(lambda: self.stream.load_state_dict(state))

    def _within(self, call: Any) -> Any:
        import torch.utils.data._utils.worker as place

        before = place._worker_info
        place._worker_info = place.WorkerInfo(id=self._place[0], num_workers=self._place[1], seed=5, dataset=None)
        try:
            return call()
        finally:
            place._worker_info = before


@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_the_states_of_workers_go_on_each_for_itself(latents: str, expected: list[str], stop: int) -> None:
    states = worker_states(dataset(latents), 3, stop)
    copies = [InWorker(dataset(latents), number, 3) for number in range(3)]
    for copy, state in zip(copies, states, strict=True):
        copy.load(state)
    found = [copies[step % 3].next() for step in range(stop, stop + 5)]
    assert digests(found) == expected[stop : stop + 5]


def test_a_workers_state_is_not_for_another_number_of_workers(latents: str) -> None:
    state = worker_states(dataset(latents), 3, 3)[0]
    assert state == {"step": 3, "skipped": [], "order": state["order"], "workers": 3}
    stream = dataset(latents)
    stream.load_state_dict(state)
    with pytest.raises(SetupError, match="one of 3 workers"):
        next(iter(stream))


def test_the_position_of_workers_is_not_guessed(latents: str, expected: list[str]) -> None:
    stream = dataset(latents)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    last = take(loader, 3)[-1]
    with pytest.raises(SetupError, match="workers read ahead"):
        stream.state_dict()
    for again in (loader, stream):
        with pytest.raises(SetupError, match="a second time"):
            take(again, 1)
    stream.load_state_dict({"step": last["step"] + 1})
    assert digests(take(loader, 3)) == expected[3:6]


def test_a_worker_that_stays_does_not_begin_anew(latents: str) -> None:
    worker = InWorker(dataset(latents), 0, 1)
    worker.next()
    with pytest.raises(SetupError, match="a second time"):
        worker.again()


def test_several_data_sets_with_weights(tmp_path: Path) -> None:
    urls = [write_latents(tmp_path / name, [(40, 0)], prefix=name) for name in ("a", "b")]
    parts = [{"manifest": urls[0], "weight": 3}, {"manifest": urls[1], "weight": 1, "share": 0.5}]
    with dataset(parts, mixing="batches") as stream:
        for item in islice(stream, 5):
            assert Counter(key[0] for key in item["keys"]) == {"a": 6, "b": 2}
    assert 40 < stream.samples < 80


def test_damage_by_option_costs_weight(tmp_path: Path) -> None:
    url = write_latents(tmp_path, [(40, 0)])
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        take(dataset(url), 5)
    with dataset(url, on_damage="skip", max_skip_rate=0.5) as stream:
        weights = torch.cat([item["weight"] for item in islice(stream, 5)])
        assert stream.state_dict()["skipped"]
    assert sorted(Counter(weights.tolist()).items()) == [(0.0, 8), (1.0, 32)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"global_batch": 0}, "global_batch: "),
        ({"seed": -1}, "seed: "),
        ({"normalisation": "white"}, "normalisation: "),
        ({"posterior": None}, "posterior: "),
        ({"caption_dropout": 1.5}, "caption_dropout: "),
        ({"split": "test"}, "split: "),
        ({"on_damage": "ignore"}, "on_damage: "),
        ({"chache": "/nvme"}, "chache: unknown field"),
        ({"batch_size": 3}, "batch_size: unknown field"),
        ({"rank": "x", "world_size": 2}, "rank: "),
        ({"rank": True, "world_size": 2}, "rank: Input should be a number, not true or false .got True"),
        ({"seed": True}, "seed: "),
        ({"window": True}, "window: "),
        ({"requests": True}, "requests: "),
        ({"caption_dropout": True}, "caption_dropout: "),
        ({"start_step": 10**30}, "start_step: "),
        ({"cache": ""}, "cache: "),
        ({"cache_gib": 1e300}, "cache_gib: "),
        ({"device": "meta"}, "device: 'meta' cannot be used: "),
        ({"device": "cud"}, "device: 'cud' cannot be used: "),
        ({"device": None}, "device: None cannot be used"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used: "),
        ({"rank": 1}, "rank=1 and world_size=None"),
        ({"rank": 2, "world_size": 2}, "rank=2 and world_size=2"),
        ({"rank": 0, "world_size": 3}, "3 ranks"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(latents: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        dataset(latents, **changes)
    assert error.value.remedy
    assert "\n" not in error.value.message


@pytest.mark.parametrize("manifests", [None, 3, [None], b"m.json", {"manifest": ""}, {"manfest": "m.json"}, {}, []])
def test_what_is_no_address_is_told(manifests: Any) -> None:
    with pytest.raises(ConfigError) as error:
        LatentDataset(manifests)
    assert error.value.remedy
    assert "\n" not in error.value.message + error.value.remedy
    assert "command" not in error.value.remedy


@pytest.mark.parametrize(
    ("wrong", "right"), [("batch_size", "global_batch"), ("shuffle_window", "window"), ("chache", "cache")]
)
def test_the_nearest_argument_is_named(latents: str, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError) as error:
        dataset(latents, **{wrong: 3})
    assert error.value.remedy == f"did you mean {right!r}?"


@pytest.mark.parametrize(
    "changes",
    [
        {"global_batch": "8"},
        {"global_batch": 8.0},
        {"seed": np.int64(3)},
        {"caption_dropout": "0.3"},
        {"window": np.int32(4), "start_step": np.int64(0)},
        {"rank": "0", "world_size": np.int64(1)},
    ],
)
def test_numbers_of_other_types_are_the_same_numbers(latents: str, expected: list[str], changes: Item) -> None:
    stream = dataset(latents, **changes)
    assert stream.state_dict() == dataset(latents).state_dict()
    assert digests(take(stream, 2)) == expected[:2]
    assert {type(value) for value in stream.state_dict().values()} == {int, list}


def test_ranks_come_from_the_launcher(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (dataset(latents).rank, dataset(latents).world_size) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (dataset(latents).rank, dataset(latents).world_size) == (3, 4)
    assert dataset(latents, rank=0, world_size=2).rank == 0
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK=4 and WORLD_SIZE=4"):
        dataset(latents)


def test_torch_distributed_is_believed_before_variables(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    early = dataset(latents)
    monkeypatch.setattr("pipeline.data.ranks._distributed", lambda: (1, 2))
    assert (dataset(latents).rank, dataset(latents).world_size) == (1, 2)
    with pytest.raises(SetupError, match="rank 0 of 1, and it is rank 1 of 2"):
        next(iter(early))
    assert take(dataset(latents, rank=0, world_size=1), 1)


def test_the_manifest_is_read_without_torch() -> None:
    code = "import sys, pipeline.data.manifest, pipeline.data.order; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_accelerates_prepare_is_told_off(latents: str) -> None:
    from accelerate.data_loader import prepare_data_loader
    from accelerate.state import AcceleratorState

    def prepared(rank: int, world_size: int, **changes: Any) -> Any:
        loader = DataLoader(dataset(latents, rank=rank, world_size=world_size), batch_size=None)
        return prepare_data_loader(loader, num_processes=world_size, process_index=rank, **changes)

    try:
        for changes in ({}, {"put_on_device": True, "device": torch.device("cpu")}):  # each rank reads, or the first
            with pytest.raises(SetupError, match="a part of its part"):
                next(iter(prepared(1, 2, **changes)))
        assert next(iter(prepared(0, 1)))["step"] == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
