"""Whether a run goes on, has finished, was stopped, or looks stalled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.console import duration
from pipeline.errors import StorageError
from pipeline.operate.runs.record import cannot_read
from pipeline.operate.runs.run import Run
from pipeline.storage import LEASE, RENEWED_SECONDS, Holder, holder

Word = Literal["finished", "running", "unfinished", "stalled", "stopped", "killed", "waiting"]
LEAST_SILENCE_SECONDS, LEAST_SILENCE_WITHOUT_LINES, LEAST_SILENCE_OF_SHARDS = 60.0, 600.0, 600.0
_TIMES_USUAL, _TIMES_THE_LONGEST, _TIMES_A_SAVE = 5.0, 2.0, 3.0
_LOOKED_AT = 50  # gaps between lines
UNREAD = Holder("an unknown host", 0, None, 0)
"""Of a lease that cannot be read."""


@dataclass(frozen=True)
class Look:
    """A run as it was read: at which Unix time, and who held its output's lease."""

    run: Run
    at: float
    holds: Holder | None


@dataclass(frozen=True)
class State:
    """How it is with a run: one word, and what there is to say about it."""

    word: Word
    said: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.said}" if self.said else self.word


def patience(run: Run) -> float:
    """Seconds without a new line that are still usual: a few times the usual gap, and the longest pause of late.

    Such pauses are validations, of which the log tells how long they took without their pictures, and saves. On S3
    lines arrive with checkpoints alone.
    """
    numbers, every = run.numbers, run.config.get("checkpoint")
    if is_remote(run) and isinstance(every, dict) and isinstance(every.get("every"), int):
        steps: int = every["every"]
        return LEAST_SILENCE_SECONDS + _TIMES_A_SAVE * steps * (run.pace or numbers.last("step_seconds") or 60.0)
    gaps = _gaps(run)
    usual = _TIMES_USUAL * float(np.quantile(gaps, 0.9)) if len(gaps) else LEAST_SILENCE_WITHOUT_LINES
    longest = max(gaps.max(initial=0.0), numbers.last("validation_seconds") or 0.0)
    return max(LEAST_SILENCE_SECONDS, usual) + _TIMES_THE_LONGEST * float(longest)


def _gaps(run: Run) -> NDArray[np.float64]:
    """Seconds between the last lines, but for those between which the run was started again."""
    steps, times = run.numbers.tail(_LOOKED_AT + 1)
    starts = np.searchsorted(np.sort(run.start_steps), steps)
    gaps = np.diff(times)
    kept: NDArray[np.float64] = gaps[(np.diff(starts) == 0) & np.isfinite(gaps) & (gaps >= 0)]
    return kept


def judge(run: Run, holds: Holder | None, silent: float | None) -> State:
    """The state of a training.

    Args:
        run: as it is now.
        holds: who holds its output's lease.
        silent: seconds since its last line was seen, or logged, or since it was started again; None = there is no line.
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


def look_at(run: Run, now: float) -> Look:
    """A run that was brought up to date a moment ago; `now`: Unix time. Raises StorageError."""
    leased = run.found.kind == "train" and not run.complete
    return Look(run, now, holder_of(run) if leased else None)


def holder_of(run: Run) -> Holder | None:
    """A training's holder; a lease that a folder does not give is one of its problems. Raises StorageError."""
    store = run.found.store
    try:
        return holder(store)
    except StorageError as error:
        run.problems.append(cannot_read(store, LEASE, error))
        return UNREAD


def states_of(looks: Sequence[Look], wait: Callable[[float], object]) -> list[State]:
    """The states of runs that are looked at once.

    Args:
        looks: at each of them.
        wait: sleeps; leases that are held elsewhere are watched for some seconds, all at once.

    Raises:
        StorageError: an output cannot be read.
    """
    if any(look.holds is not None and look.holds.lives is None and look.holds != UNREAD for look in looks):
        wait(RENEWED_SECONDS + 1)
    return [_state(look) for look in looks]


def _state(look: Look) -> State:
    run, holds = look.run, look.holds
    if run.found.kind == "encode":
        return state_of_encode(run)
    if holds is not None and holds.lives is None and holds != UNREAD:
        now = holder_of(run)
        holds = now and Holder(now.host, now.pid, True if now.counter != holds.counter else now.lives, now.counter)
    return judge(run, holds, silence(run, look.at))


def silence(run: Run, now: float) -> float | None:
    """Seconds since its last line, or start, by what these note; None where there is no line, or it does not tell."""
    _, times = run.numbers.tail(1)
    if not len(times) or not np.isfinite(times[0]):
        return None
    begun = run.starts[-1].get("time") if run.starts else None
    latest = max(float(times[0]), begun) if isinstance(begun, int | float) else float(times[0])
    return max(0.0, now - latest)


def is_remote(run: Run) -> bool:
    """Whether it is on S3, where nothing can be appended to."""
    return "://" in run.found.store.url


def state_of_encode(run: Run, *, came: bool = False, silent: float = 0.0, usual: float = 0.0) -> State:
    """Of an encode job, which leaves receipts alone.

    Args:
        run: as it is now.
        came: whether shards were seen to come.
        silent: seconds since the last one did, or since the job is looked at.
        usual: the longest that it took one to come, so far.
    """
    done = sum(part.tally.shards for part in run.encoded)
    shards = f"{done:,} shard{'s' * (done != 1)}"
    if run.complete:
        return State("finished", shards)
    said = f"{shards} stored, no manifest yet"
    if silent > max(LEAST_SILENCE_OF_SHARDS, _TIMES_USUAL * usual):
        return State("stalled", f"no new shard for {duration(silent)}: {said}; or it was stopped")
    if came:
        return State("running", said)
    return State("unfinished" if done else "waiting", f"{said}: it goes on, or was stopped")
