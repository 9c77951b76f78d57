"""Checkpoints that are written while training goes on: copied in memory by the main thread, stored by another one.

The layout on disk is described in `pipeline.train.checkpoint`. Each rank copies its fragments into memory that it
holds for that, in the layout of their file; its background thread hashes and stores them. There is no collective in
that thread: how far a rank is travels as flags, with what ranks tell each other in each step anyway. Once all parts
are stored, rank 0's thread writes the completion marker and deletes what is too old.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save as tensor_bytes

from pipeline.data.threads import WorkerThreads
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.storage.lease import LostLeaseError
from pipeline.train.checkpoint import COMPLETE, DONE, FORMAT_VERSION, FROZEN, RUN, as_json, noted, step_name
from pipeline.train.sharded import FAULTS
from pipeline.train.shelf import Shelf
from pipeline.train.telling import say
from pipeline.train.tensor_file import TensorFile

MARKERS_AT_ONCE = 16
"""Of all ranks' parts, which rank 0 reads before it writes the completion marker."""
_log = logging.getLogger(__name__)


@dataclass
class Save:
    """One save, on its way or done."""

    step: int
    run: dict[str, Any]  # run.json
    notes: Mapping[str, Any]
    started: float
    taken: float  # when the state was copied, Unix time in seconds
    size: int = 0  # bytes of all files; rank 0 knows it once the save is complete
    seconds: float = 0.0  # from the first copy to the completion marker, on rank 0


class Saver:
    """Saves of one kind in one store, one on its way at a time; all ranks call each method at the same step.

    Args:
        store: where checkpoints are written.
        ranks: this rank among the others.
        engine: whose state is saved. Host memory is taken for all of it at once.
        worker: one background thread.
        shelf: of the store.
        texts: files that are written as they are, such as config.yaml.
        keys: which of `state.keys`; None = all, and only then can a training go on from it.
        limit: saves that may fail one after the other; the last of them is an error.
        before_marker: called on rank 0's background thread before a completion marker is written.
        when_done: called with each save, on all ranks.
    """

    def __init__(
        self,
        store: Store,
        ranks: Process,
        engine: Engine,
        worker: WorkerThreads,
        shelf: Shelf,
        *,
        texts: Mapping[str, bytes],
        keys: Sequence[str] | None = None,
        limit: int = 1,
        before_marker: Callable[[], None] = lambda: None,
        when_done: Callable[[Save], None] = lambda save: None,
    ) -> None:
        self._store, self._ranks, self._engine, self._worker, self._shelf = store, ranks, engine, worker, shelf
        self._texts, self._keys, self._limit = texts, tuple(keys or state.keys(engine)), limit
        self._before_marker, self._when_done = before_marker, when_done
        self._stem = f"rank-{ranks.rank:05d}-of-{ranks.world_size:05d}"
        self._spans = state.spans(engine)
        self._fragments = [fragment for span in self._spans for fragment in span.fragments]
        names = [(f"{p}:{at}:{key}", n) for span in self._spans for key in self._keys for p, at, n in span.fragments]
        self._file = TensorFile(names, pinned=ranks.device.type == "cuda")
        self._frozen, self._buffers = state.frozen(engine, keep=ranks.is_main), state.buffers(engine)
        self._shapes = state.shapes(engine)
        self._number = 0
        self._save: Save | None = None
        self._concluding = False
        self._in_a_row = 0
        self.failures = 0
        """Saves that failed so far."""
        self.newest = self._newest_before = 0
        """Step of the newest save that has not failed; 0 = none."""
        # written by the background thread: numbers of saves
        self._written = self._failed = self._concluded = 0
        self._problem: Exception | None = None
        self._quiet = threading.Event()
        self._quiet.set()

    def begin(self, step: int, *, counters: Mapping[str, int], notes: Mapping[str, Any], last: bool = False) -> None:
        """Copy this rank's state; the rest is done in the background. A save that is on its way is waited for.

        Args:
            step: steps done.
            counters: numbers that `sharded.restore` gives back, with `step` and `optimizer_step`.
            notes: of this rank alone, for JSON; see `Checkpoint.notes`.
            last: no step follows: this state is tried although the save before it was one too many to fail.

        Raises:
            LatheError: the one that was on its way failed, and it was one too many.
        """
        self.settle(before_last=last)
        started, taken = time.perf_counter(), time.time()
        self._copy()
        everything = {**counters, "step": step, "optimizer_step": state.optimizer_step(self._engine)}
        run = {
            "format_version": FORMAT_VERSION,
            "counters": everything,
            "parameters": self._shapes,
            "keys": self._keys,
        }
        self._number += 1
        self._save, self._concluding, self._problem = Save(step, run, notes, started, taken), False, None
        self._newest_before, self.newest = self.newest, step
        self._submit(self._write_part, "_written")

    @property
    def memory_bytes(self) -> int:
        """Host memory that it holds for the copy."""
        return len(self._file.data)

    @property
    def problem(self) -> Exception | None:
        """Why this rank's part of the newest save failed."""
        return self._problem

    @property
    def flags(self) -> tuple[int, int, int]:
        """How far this rank is, for the largest of each over all ranks to tell how far the save is."""
        written, concluded = self._written, self._concluded  # before what tells whether they failed
        return -written, self._failed, concluded

    def hear(self, told: Sequence[int], *, last: bool = False, before_last: bool = False) -> None:
        """Go on with the save that is on its way, if it is so far.

        Args:
            told: the largest that a rank has of each flag.
            last: there is no training to go on with: a failure is an error.
            before_last: the last one follows at once: a failure is only told.

        Raises:
            LatheError: the save failed, and it was one too many.
        """
        if self._save is None:
            return
        behind, failed, concluded = told
        if -behind < self._number or (self._concluding and concluded < self._number):
            return
        if failed == self._number:
            self._fail(self._save, last=last, before_last=before_last)
        elif self._concluding:
            done, self._save, self._in_a_row = self._save, None, 0
            self._when_done(done)
        else:
            self._concluding = True
            if self._ranks.is_main:
                self._submit(self._conclude, "_concluded")

    def settle(self, *, last: bool = False, before_last: bool = False) -> None:
        """Wait for the save that is on its way, if any. Raises as `hear` does."""
        while self._save is not None:
            self._ranks.wait_for_all(self._quiet.wait)
            self.hear(self._ranks.largest(*self.flags), last=last, before_last=before_last)

    def _copy(self) -> None:
        """All spans one after the other; the host waits for the device once."""
        at = 0
        for span in self._spans:
            tensors = span.tensors(self._engine)
            for key in self._keys:
                source = tensors[key]
                self._file.elements[at : at + len(source)].copy_(source, non_blocking=True)
                at += len(source)
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if self._ranks.is_main:
            self._frozen.update(self._buffers())

    def _submit(self, work: Callable[[Save], None], mark: str) -> None:
        """Have the background thread do it for the present save, and then note the save's number."""
        save, number = self._save, self._number
        assert save is not None  # noqa: S101
        self._quiet.clear()

        def do() -> None:
            try:
                work(save)
            except Exception as error:
                self._problem, self._failed = error, number
            finally:
                setattr(self, mark, number)
                self._quiet.set()

        self._worker.submit(do, ())

    def _write_part(self, save: Save) -> None:
        name, data = step_name(save.step), self._file.data
        about = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self._store.write(f"{name}/{self._stem}.safetensors", data)
        done = {"file": f"{self._stem}.safetensors", **about, "fragments": self._fragments, "notes": dict(save.notes)}
        self._store.write(f"{name}/{self._stem}{DONE}", as_json(done))

    def _conclude(self, save: Save) -> None:
        """All ranks' parts are there: what there is once, then the marker."""
        name = step_name(save.step)
        once = {**self._texts, RUN: as_json(save.run), FROZEN: tensor_bytes(self._frozen)}
        for file, data in once.items():
            self._store.write(f"{name}/{file}", data)
        files = {**{file: noted(data) for file, data in once.items()}, **self._collect(name)}
        self._before_marker()
        self._store.write(f"{name}/{COMPLETE}", as_json({"files": files}))
        save.size = sum(int(file["size"]) for file in files.values())
        save.seconds = time.perf_counter() - save.started
        try:
            # of steps that were skipped the weights may be the cause: what was before is needed
            self._shelf.add(save.step, retire=not save.run["counters"].get("skipped_in_a_row"))
        except FAULTS as error:  # the checkpoint counts, and the next one tries again
            _log.warning("what is too old could not be deleted after step %d: %s", save.step, error)

    def _collect(self, name: str) -> dict[str, dict[str, Any]]:
        """The ranks' files as their done-markers note them."""
        size = self._ranks.world_size
        markers = [f"rank-{rank:05d}-of-{size:05d}{DONE}" for rank in range(size)]
        files: dict[str, dict[str, Any]] = {}
        for marker, data in zip(markers, self._read([f"{name}/{marker}" for marker in markers]), strict=True):
            done = json.loads(data)
            files |= {marker: noted(data), done["file"]: {"size": done["size"], "sha256": done["sha256"]}}
        return files

    def _read(self, names: Sequence[str]) -> list[bytes]:
        """Several at a time: of thousands of ranks one after the other takes minutes on S3."""
        found: list[Future[bytes]] = [Future() for _ in names]
        readers = WorkerThreads(min(len(names), MARKERS_AT_ONCE), "lathe-markers")
        for name, future in zip(names, found, strict=True):
            readers.submit(partial(self._read_into, future, name), (future,))
        try:
            return [future.result() for future in found]
        finally:
            readers.close(0)

    def _read_into(self, future: Future[bytes], name: str) -> None:
        future.set_result(self._store.read(name))

    def _fail(self, save: Save, *, last: bool, before_last: bool) -> None:
        """Count it, and tell why once; or raise, where it was one too many, the lease is lost, or it is a bug."""
        problem, self._save, self.newest = self._problem, None, self._newest_before
        self.failures += 1
        self._in_a_row += 1
        teller = self._ranks.first(problem is not None) or 0
        reason = self._ranks.text_of(teller, str(problem))
        passing = problem is None or (isinstance(problem, FAULTS) and not isinstance(problem, LostLeaseError))
        too_many = self._in_a_row >= self._limit and not before_last
        if last or too_many or self._ranks.any(not passing):
            self._ranks.agree(problem)
        then = "the last step is tried" if before_last else "training goes on"
        say(f"step {save.step} could not be saved, {then} ({self._in_a_row} of {self._limit} in a row):")
        say(reason)
        if self._ranks.is_main:
            self._worker.submit(partial(self._give_up, save.step), ())

    def _give_up(self, step: int) -> None:
        try:
            self._shelf.give_up(step)
        except FAULTS as error:
            _log.debug("what was left of step %d is deleted later: %s", step, error)
