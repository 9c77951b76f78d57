"""Whether a run goes on, has finished, was stopped, or looks stalled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.console import duration
from pipeline.operate.runs.run import Run
from pipeline.storage import RENEWED_SECONDS, Holder, Store, holder

Word = Literal["finished", "running", "stalled", "stopped", "killed", "waiting"]
LEAST_SILENCE_SECONDS, LEAST_SILENCE_OF_SHARDS = 60.0, 600.0
_TIMES_USUAL = 5.0
_TIMES_A_SAVE = 3.0
_LOOKED_AT = 50  # lines


@dataclass(frozen=True)
class State:
    """How it is with a run: one word, and what there is to say about it."""

    word: Word
    said: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.said}" if self.said else self.word


def patience(run: Run) -> float:
    """Seconds without a new line that are still usual: a few times the longest of the last gaps between lines.

    On S3 lines arrive with checkpoints alone.
    """
    numbers, every = run.numbers, run.config.get("checkpoint")
    if is_remote(run) and isinstance(every, dict) and isinstance(every.get("every"), int):
        steps: int = every["every"]
        return LEAST_SILENCE_SECONDS + _TIMES_A_SAVE * steps * (numbers.last("step_seconds") or 60.0)
    gaps = np.diff(numbers.times[-_LOOKED_AT:])
    gaps = gaps[np.isfinite(gaps) & (gaps >= 0)]
    return max(LEAST_SILENCE_SECONDS, _TIMES_USUAL * float(np.quantile(gaps, 0.9))) if len(gaps) else 600.0


def judge(run: Run, holds: Holder | None, silent: float | None) -> State:
    """The state of a training.

    Args:
        run: as it is now.
        holds: who holds its output's lease.
        silent: seconds since its last line was seen, or logged; None = there is no line.
    """
    step, target = run.numbers.last_step, run.target
    leased = run.found.kind == "train"
    at = f"step {step:,}" + (f" of {target:,}" if target else "") if step is not None else "its first line"
    if run.complete:
        return State("finished", f"all {target:,} steps" if target else "")
    if holds is None and leased:
        return State("stopped", f"at {at}; the same command goes on") if step is not None else State("waiting")
    if holds is not None and holds.lives is False:
        return State("killed", f"{holds} is gone, at {at}; the same command goes on from the last checkpoint")
    if silent is None:
        return State("waiting", "no line in its log yet")
    if silent <= patience(run):
        return State("running", f"at {at}")
    quiet = f"no new line for {duration(silent)}, at {at}"
    return State("stalled", quiet if leased else f"{quiet}; or it was stopped")


def holder_now(store: Store, wait: Callable[[float], object]) -> Holder | None:
    """The lease's holder; of one on another machine, whether it lives is found out by watching it for a moment."""
    first = holder(store)
    if first is None or first.lives is not None:
        return first
    wait(RENEWED_SECONDS + 1)
    now = holder(store)
    return now and Holder(now.host, now.pid, True if now.counter != first.counter else now.lives, now.counter)


def state_of(run: Run, *, now: float, wait: Callable[[float], object]) -> State:
    """The state of a run that is looked at once.

    Args:
        run: brought up to date a moment ago.
        now: Unix time.
        wait: sleeps; a lease that is held elsewhere is watched for some seconds.

    Raises:
        StorageError: the output cannot be read.
    """
    if run.found.kind == "encode":
        return state_of_encode(run)
    leased = run.found.kind == "train" and not run.complete
    return judge(run, holder_now(run.found.store, wait) if leased else None, silence(run, now))


def silence(run: Run, now: float) -> float | None:
    """Seconds since its last line, by that line's own time; None where there is none, or it does not tell."""
    times = run.numbers.times[-1:]
    return max(0.0, now - float(times[0])) if len(times) and np.isfinite(times[0]) else None


def is_remote(run: Run) -> bool:
    """Whether it is on S3, where nothing can be appended to."""
    return "://" in run.found.store.url


def state_of_encode(run: Run, silent: float = 0.0, usual: float = 0.0) -> State:
    """Of an encode job, which leaves receipts alone.

    Args:
        run: as it is now.
        silent: seconds since a shard was seen to come.
        usual: the longest that it took one to come, so far.
    """
    done = sum(part.tally.shards for part in run.encoded)
    if run.complete:
        return State("finished", f"{done:,} shards")
    said = f"{done:,} shards are stored, no manifest yet"
    if silent > max(LEAST_SILENCE_OF_SHARDS, _TIMES_USUAL * usual):
        return State("stalled", f"no new shard for {duration(silent)}: {said}; or it was stopped")
    return State("running" if done else "waiting", f"{said}: it goes on, or was stopped")
