"""Saves in the background by one rank: what the main thread does, what a failing store costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import alone, small_engine
from torch import Tensor

from pipeline.data.threads import WorkerThreads
from pipeline.errors import LatheError, StorageError
from pipeline.storage import Store, open_store
from pipeline.storage.lease import LostLeaseError
from pipeline.train import checkpoint
from pipeline.train.saver import MARKERS_AT_ONCE, Save, Saver
from pipeline.train.saves import Saves
from pipeline.train.shelf import Shelf, newest_and_every

THREAD = "lathe-save-0"


class Faulty:
    """A store that fails at the files that it is told, and may be held up; it notes which threads ask it."""

    def __init__(self, store: Store) -> None:
        self._store, self.url, self.fails_at = store, store.url, ""
        self.open = threading.Event()
        self.open.set()
        self.threads: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.threads.add(threading.current_thread().name)
        return getattr(self._store, name)

    def write(self, name: str, data: bytes) -> bool:
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(20)
        if self.fails_at and name.endswith(self.fails_at):
            raise StorageError(f"{name}: no room to write it", "free some disk space")
        return self._store.write(name, data)


class Bed:
    """A small network, its engine, and who saves it."""

    def __init__(self, folder: Any, limit: int = 3, keep: int = 2) -> None:
        ranks = alone()
        self.engine = small_engine(ranks)
        self.store = Faulty(open_store(str(folder)))
        self.done: list[Save] = []
        self.before_marker: Callable[[], None] = lambda: None
        self.saver = Saver(
            self.store,  # type: ignore[arg-type]
            ranks,
            self.engine,
            WorkerThreads(1, "lathe-save"),
            Shelf(self.store, newest_and_every(keep)),  # type: ignore[arg-type]
            texts={"note.txt": b"x"},
            limit=limit,
            before_marker=self._before_marker,
            when_done=self.done.append,
        )
        self.step = 0

    def _before_marker(self) -> None:
        self.before_marker()

    def train(self) -> None:
        x = torch.randn(4, 5)
        self.engine.backward((self.engine(x) - x).square().mean())
        self.engine.step(1e-2)
        self.step += 1

    def begin(self, **counters: int) -> None:
        self.train()
        self.saver.begin(self.step, counters=counters or {"skipped": 0}, notes={})

    def save(self, **counters: int) -> None:
        self.begin(**counters)
        self.saver.settle()

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.engine.module.state_dict().items()}

    def steps(self) -> list[int]:
        return [found.step for found in checkpoint.find(self.store)]  # type: ignore[arg-type]


def test_what_is_stored_is_the_state_of_its_step_though_training_went_on(tmp_path):
    bed = Bed(tmp_path)
    bed.store.threads.clear()
    bed.store.open.clear()
    bed.begin()
    expected, begun = bed.weights(), time.time()
    for _ in range(3):
        bed.train()
    assert bed.saver.newest == 1
    assert bed.store.threads <= {THREAD}  # the main thread asked for nothing
    bed.store.open.set()
    bed.saver.settle()
    assert bed.store.threads == {THREAD, "lathe-markers-0"}
    assert begun - 5 < bed.done[0].taken <= begun  # it is as old as what is in it
    found = checkpoint.load_weights(bed.store, "step-00000001", "raw")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.float()) or not value.ndim for name, value in expected.items())
    assert bed.done[0].size == sum(entry.size for entry in bed.store.list("step-00000001/")) - len(
        bed.store.read("step-00000001/complete.json")
    )
    assert checkpoint.open_checkpoint(bed.store, "step-00000001").run()["counters"] == {
        "skipped": 0,
        "step": 1,
        "optimizer_step": 1,
    }


def test_markers_of_many_ranks_are_read_several_at_a_time(tmp_path):
    bed, together = Bed(tmp_path), threading.Barrier(MARKERS_AT_ONCE)

    def read(name: str) -> bytes:
        together.wait(20)
        return name.encode()

    bed.saver._store = SimpleNamespace(read=read)
    names = [str(rank) for rank in range(2 * MARKERS_AT_ONCE)]
    assert bed.saver._read(names) == [name.encode() for name in names]


def test_a_save_amid_skipped_steps_costs_none_of_those_before(tmp_path):
    bed = Bed(tmp_path, keep=1)
    bed.save()
    bed.save(skipped_in_a_row=3)
    assert bed.steps() == [2, 1]
    bed.save(skipped_in_a_row=0)
    assert bed.steps() == [3]


def test_flags_of_the_save_before_say_nothing_of_this_one(tmp_path):
    bed = Bed(tmp_path)
    bed.save()
    old = bed.saver.flags
    bed.store.open.clear()
    bed.begin()
    bed.saver.hear(old)
    assert bed.saver.flags == old
    bed.store.open.set()
    bed.saver.settle()
    assert bed.steps() == [2, 1]


def test_a_save_that_comes_due_waits_for_the_one_before(tmp_path):
    bed = Bed(tmp_path, keep=9)
    bed.store.open.clear()
    bed.begin()
    threading.Timer(0.3, bed.store.open.set).start()
    bed.begin()
    assert [save.step for save in bed.done] == [1]
    bed.saver.settle()
    assert bed.steps() == [2, 1]


@pytest.mark.parametrize(
    "file", ["00001.safetensors", ".done.json", "note.txt", "run.json", "frozen.safetensors", "complete.json"]
)
def test_a_store_that_fails_costs_one_checkpoint_and_is_told_once(tmp_path, capfd, file):
    bed = Bed(tmp_path)
    bed.save()
    before = {entry.name: bed.store.read(entry.name) for entry in bed.store.list()}
    bed.store.fails_at = file
    bed.save()
    said = capfd.readouterr().err
    assert said.startswith("step 2 could not be saved, training goes on (1 of 3 in a row):\n")
    assert said.count("no room to write it\n  free some disk space\n") == 1
    assert bed.steps() == [1]
    assert bed.saver.newest == 1
    assert {name: bed.store.read(name) for name in before} == before
    bed.store.fails_at = ""
    bed.save()
    assert bed.steps() == [3, 1]
    assert {entry.name.partition("/")[0] for entry in bed.store.list()} == {"step-00000001", "step-00000003"}
    assert bed.saver.failures == 1


def test_failures_in_a_row_are_an_error_at_the_limit(tmp_path):
    bed = Bed(tmp_path, limit=2)
    for fails_at in ("run.json", "", "run.json"):
        bed.store.fails_at = fails_at
        bed.save()
    with pytest.raises(StorageError, match="no room to write it"):
        bed.save()
    assert bed.steps() == [2]
    assert bed.saver.failures == 3


def test_the_last_one_must_not_fail(tmp_path):
    bed = Bed(tmp_path)
    bed.store.fails_at = "run.json"
    bed.begin()
    with pytest.raises(StorageError, match="no room to write it"):
        bed.saver.settle(last=True)


def test_the_last_state_is_tried_although_the_save_before_was_one_too_many_to_fail(tmp_path, capfd):
    bed = Bed(tmp_path, limit=1)
    ranks, told = bed.saver._ranks, SimpleNamespace(note=lambda *_: None)
    saves = Saves(bed.store, ranks, bed.engine, engine_config={}, config=None, datasets=None, metrics=told, lease=None)
    saves._saver, saves._savers = bed.saver, [bed.saver]
    bed.store.fails_at = ".done.json"
    bed.begin()
    assert bed.saver._quiet.wait(20)
    bed.store.fails_at = ""
    saves.hear((False, *bed.saver.flags), only_lease=True)
    bed.train()
    bed.saver.begin(bed.step, counters={}, notes={}, last=True)
    saves.finish()
    assert capfd.readouterr().err.startswith("step 1 could not be saved, the last step is tried (1 of 1 in a row):\n")
    assert bed.steps() == [2]


def saves_of(*savers) -> Saves:
    """Whose first saver is the checkpoints'."""
    told = SimpleNamespace(note=lambda *_: None, flush=lambda: None)
    first = savers[0]
    saves = Saves(
        first._store,
        first._ranks,
        first._engine,
        engine_config={},
        config=None,
        datasets=None,
        metrics=told,
        lease=None,
    )
    saves._saver, saves._savers = first, list(savers)
    return saves


def test_a_run_ends_well_though_a_snapshot_of_an_earlier_step_fails_last(tmp_path):
    checkpoints, snapshots = Bed(tmp_path / "a"), Bed(tmp_path / "b", limit=3)
    snapshots.store.fails_at = ".done.json"
    checkpoints.step = 1  # it is further
    for bed in (checkpoints, snapshots):
        bed.begin()
    saves_of(checkpoints.saver, snapshots.saver).finish()
    assert (checkpoints.steps(), snapshots.steps(), snapshots.saver.failures) == ([2], [], 1)

    for bed in (checkpoints, snapshots):
        bed.begin()
    snapshots.saver.newest = checkpoints.saver.newest
    with pytest.raises(StorageError):  # of the last step, it is told
        saves_of(checkpoints.saver, snapshots.saver).finish()


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError("no disk")])
def test_whatever_a_save_dies_of_the_others_are_waited_for_and_the_first_error_goes_on(tmp_path, error):
    checkpoints, snapshots = Bed(tmp_path / "a"), Bed(tmp_path / "b")
    bed = checkpoints

    def fail() -> None:
        raise error

    bed.before_marker = fail
    for each in (checkpoints, snapshots):
        each.begin()
    saves = saves_of(checkpoints.saver, snapshots.saver)
    with pytest.raises(type(error)):
        saves.finish()
    assert snapshots.steps() == [1]


def test_an_error_of_a_step_is_not_hidden_by_one_of_a_disk(tmp_path):
    bed = Bed(tmp_path)

    def fail() -> None:
        raise OSError("no disk")

    bed.before_marker = fail
    bed.begin()
    with pytest.raises(LatheError, match="of a step"), saves_of(bed.saver).finished_first():
        raise LatheError("of a step")


@pytest.mark.parametrize("error", [LostLeaseError("taken over"), ZeroDivisionError("a bug")])
def test_a_lost_output_and_a_bug_end_the_run_at_once_and_no_marker_is_written(tmp_path, error):
    bed = Bed(tmp_path)
    bed.save()

    def fail() -> None:
        raise error

    bed.before_marker = fail
    with pytest.raises(type(error), match=str(error)):
        bed.save()
    assert bed.steps() == [1]


def test_old_ones_that_cannot_be_deleted_do_not_cost_the_new_one(tmp_path, caplog):
    bed = Bed(tmp_path, keep=1, limit=1)
    bed.save()
    bed.store.delete = lambda names: _fail()
    bed.begin()
    bed.saver.settle(last=True)
    assert "could not be deleted after step 2: cannot delete" in caplog.text
    assert (bed.steps(), bed.saver.failures, bed.saver.newest) == ([2, 1], 0, 2)
    del bed.store.delete
    bed.save()
    assert bed.steps() == [3]


def _fail() -> None:
    raise LatheError("cannot delete", "mend the store")


@pytest.mark.parametrize("is_lost", [False, True])
def test_an_error_lets_saves_and_log_be_finished_but_not_in_anothers_output(tmp_path, is_lost):
    bed, flushed, lost = Bed(tmp_path), [], [False]

    class Log:
        def flush(self) -> None:
            flushed.append(1)

    def check() -> None:
        if lost[0]:
            raise LostLeaseError("taken over")

    ranks = alone()
    saves = Saves(
        bed.store,
        ranks,
        bed.engine,
        engine_config={},
        config=None,
        datasets=None,
        metrics=Log(),
        lease=SimpleNamespace(check=check, lost=None),
    )
    saves._saver, saves._savers = bed.saver, [bed.saver]
    bed.before_marker = saves._before_marker
    bed.begin()
    lost[0] = is_lost
    with pytest.raises(LatheError, match="of a step"), saves.finished_first():
        raise LatheError("of a step")
    assert bed.steps() == ([] if is_lost else [1])
    assert bool(flushed) is not is_lost


def test_an_output_that_was_lost_ends_the_run_within_a_step(tmp_path):
    bed = Bed(tmp_path)
    lease = SimpleNamespace(check=lambda: None, lost=None)
    ranks = alone()
    saves = Saves(bed.store, ranks, bed.engine, engine_config={}, config=None, datasets=None, metrics=None, lease=lease)
    saves._savers = []
    assert saves.flags() == (False,)
    lease.lost = LostLeaseError("taken over")
    assert saves.flags() == (True,)
    with pytest.raises(LostLeaseError, match="taken over"):
        saves.hear((1,))
