"""What counts as a checkpoint, what is kept, and whole tensors out of fragments. No engine, no ranks."""

from __future__ import annotations

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint
from pipeline.train.checkpoint import COMPLETE, FORMAT_VERSION, FROZEN, DamagedError

WEIGHTS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5.0) - 9, "c": torch.tensor(7.0)}


def write(store: Store, step: int, cuts: list[int] | None = None, averages: tuple[str, ...] = ("main", "slow")) -> str:
    contents = {"weight": WEIGHTS}
    for number, name in enumerate(averages, start=2):
        contents[f"ema.{name}"] = {parameter: number * weight for parameter, weight in WEIGHTS.items()}
    frozen = {"table": torch.ones(2, dtype=torch.bfloat16), "ids": torch.arange(3)}
    return write_checkpoint(store, step, contents, cuts=cuts, frozen=frozen)


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path))


def test_nothing_yet(store):
    assert checkpoint.latest(store) is None
    with pytest.raises(DataError, match="not a complete checkpoint"):
        checkpoint.open_checkpoint(store, "step-00000001")


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 18), max_size=4))
def test_whole_tensors_from_any_cut(tmp_path_factory, cuts):
    store = open_store(str(tmp_path_factory.mktemp("cut")))
    name = write(store, 3, cuts)
    for which, factor in (("raw", 1.0), ("main", 2.0), ("slow", 3.0), ("", 2.0)):
        loaded = checkpoint.load_weights(store, name, which)
        assert loaded.keys() == {*WEIGHTS, "table", "ids"}
        for parameter, weight in WEIGHTS.items():
            assert torch.equal(loaded[parameter], factor * weight)
        assert loaded["table"].dtype == torch.float32
        assert loaded["ids"].dtype == torch.int64


def test_weights_of_a_name_that_is_not_there(store):
    name = write(store, 1)
    with pytest.raises(DataError, match="has no weights named fast\n  use one of: raw, main, slow"):
        checkpoint.load_weights(store, name, "fast")


def test_without_averages_the_weights_themselves_are_taken(store):
    name = write(store, 1, averages=())
    assert torch.equal(checkpoint.load_weights(store, name)["a"], WEIGHTS["a"])
    assert checkpoint.default_weights(checkpoint.open_checkpoint(store, name).run()) == "raw"
    assert checkpoint.default_weights(checkpoint.open_checkpoint(store, write(store, 2)).run()) == "main"


def test_a_sum_over_checkpoints_cut_differently(store):
    both = [checkpoint.open_checkpoint(store, write(store, *which)) for which in ((1, [4, 13]), (2, [9]))]
    terms = [(both[0], {"ema.main": 0.5, "weight": -1.0}), (both[1], {"ema.slow": 2.0})]
    found = checkpoint.combine(terms, both[0].run()["parameters"])
    for parameter, weight in WEIGHTS.items():
        torch.testing.assert_close(found[parameter], (1.0 - 1.0 + 6.0) * weight)


def test_the_newest_by_number_wins(store):
    for step in (99_999_999, 100_000_000, 5):
        write(store, step)
    assert checkpoint.latest(store) == "step-100000000"


def test_without_its_marker_it_does_not_count(store):
    write(store, 1)
    store.delete([f"{write(store, 2)}/{COMPLETE}"])
    assert checkpoint.latest(store) == "step-00000001"


@pytest.mark.parametrize(
    "damage", ["missing file", "cut file", "cut marker", "{}", '{"files": {"run.json": 3}}', '{"files": []}']
)
def test_a_newer_one_that_is_not_whole_is_passed_over_and_said(store, tmp_path, caplog, damage):
    write(store, 1)
    folder = tmp_path / write(store, 2)
    if damage == "missing file":
        (folder / FROZEN).unlink()
    elif damage.startswith("{"):
        (folder / COMPLETE).write_text(damage)
    else:
        file = folder / (FROZEN if damage == "cut file" else COMPLETE)
        file.write_bytes(file.read_bytes()[:-3])
    assert checkpoint.latest(store) == "step-00000001"
    assert "step-00000002" in caplog.text


def test_one_that_a_training_deletes_meanwhile_is_passed_over(store):
    write(store, 1)
    name = write(store, 2)

    class Deleting:
        url = store.url

        def __getattr__(self, attribute):
            return getattr(store, attribute)

        def read(self, file):
            checkpoint.clear(store, name)
            return store.read(file)

    assert checkpoint.latest(Deleting()) == "step-00000001"


def test_a_changed_byte_is_named(store, tmp_path):
    name = write(store, 2)
    file = tmp_path / name / "rank-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"rank-00000-of-00001\.safetensors is damaged"):
        checkpoint.load_weights(store, name)


def test_a_newer_format_is_refused(store, monkeypatch):
    name = write(store, 1)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", FORMAT_VERSION - 1)
    with pytest.raises(DataError, match="format version"):
        checkpoint.load_weights(store, name)
