"""Which checkpoints stay; no engine, no ranks."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage import Store, open_store
from pipeline.train import checkpoint
from pipeline.train.checkpoint import COMPLETE, FROZEN, step_name
from pipeline.train.shelf import Shelf, newest_and_every


def write(store: Store, *steps: int) -> None:
    for step in steps:
        write_checkpoint(store, step, {"weight": {"a": torch.ones(2)}})


def steps(store: Store) -> list[int]:
    return sorted(found.step for found in checkpoint.find(store))


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 90))
)
def test_the_newest_stay_and_the_first_of_each_stretch_for_good(gaps, keep, every):
    rule, there = newest_and_every(keep, every), []
    taken = list(accumulate(gaps))
    for step in taken:
        there = sorted(rule([*there, step]))
    first = {} if every is None else {step // every: step for step in reversed(taken)}
    assert there == sorted({*taken[-keep:], *first.values()})


def test_without_a_number_all_stay():
    assert newest_and_every(None)([1, 2, 3]) == {1, 2, 3}


def test_old_ones_go_and_others_files_stay(store):
    shelf = Shelf(store, newest_and_every(2, 10))
    store.write("step-notes/keep.txt", b"not ours")
    shelf.open(0)
    for step in (4, 8, 12, 16, 20, 24, 28):
        write(store, step)
        shelf.add(step)
    assert steps(store) == shelf.steps == [4, 12, 20, 24, 28]
    assert store.exists("step-notes/keep.txt")


def test_what_killed_runs_left_goes_at_the_start(store, tmp_path):
    write(store, 4, 8, 12)
    for step in (4, 12):
        (tmp_path / step_name(step) / COMPLETE).unlink()
    partial = tmp_path / step_name(20) / ".rank-00000-of-00001.safetensors.0123456789ab.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"cut")
    assert Shelf(store, newest_and_every(2)).open(8) == []
    assert {entry.name.partition("/")[0] for entry in store.list()} == {step_name(8)}
    assert store.leftovers() == ()


def test_what_is_later_goes_at_once_or_with_the_next_one(store):
    write(store, 4, 8, 12, 16)
    shelf = Shelf(store, newest_and_every(9))
    assert shelf.open(8) == []
    assert shelf.steps == [4, 8]
    shelf.give_up(10)
    assert steps(store) == [4, 8, 12, 16]
    shelf.add(12)
    assert steps(store) == shelf.steps == [4, 8, 12]
    assert Shelf(store, newest_and_every(9)).open(4, clear_later=True) == [step_name(8), step_name(12)]
    assert steps(store) == [4]


def test_a_damaged_one_stays_until_there_is_a_new_one(store, tmp_path):
    write(store, 4, 8)
    (tmp_path / step_name(8) / FROZEN).write_bytes(b"")
    shelf = Shelf(store, newest_and_every(3))
    assert shelf.open(8) == []
    assert (tmp_path / step_name(8)).exists()
    write(store, 12)
    shelf.add(12)
    assert shelf.steps == [4, 12]
    assert not (tmp_path / step_name(8) / COMPLETE).exists()


def test_what_a_failed_save_left_is_deleted_and_if_that_fails_later(store, tmp_path, monkeypatch):
    shelf = Shelf(store, newest_and_every(1))
    shelf.open(0)
    write(store, 4)
    shelf.add(4)
    write(store, 8)
    (tmp_path / step_name(8) / COMPLETE).unlink()
    monkeypatch.setattr(type(store), "delete", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shelf.give_up(8)
    monkeypatch.undo()
    write(store, 12)
    shelf.add(12)
    assert {entry.name.partition("/")[0] for entry in store.list()} == {step_name(12)}
