"""A run that is watched: brought up to date now and then, and judged by what changes while it is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from pipeline.console import duration
from pipeline.errors import StorageError
from pipeline.operate.runs.run import Run
from pipeline.operate.runs.state import UNREAD, State, holder_of, is_remote, judge, silence, state_of_encode
from pipeline.operate.watch.figures import Figure, figures, percent, seconds_left, share_done
from pipeline.storage import Holder

LOCAL_SECONDS, REMOTE_SECONDS, LEAST_REMOTE_SECONDS = 2.0, 30.0, 10.0
_REST = 10  # a look may take a tenth of the time
_WATCHED_SECONDS = 12.0  # of a lease elsewhere, that does not move


class Watched:
    """One run, its state and its news.

    Args:
        run: that is watched.
        every: seconds between two looks; None = by where it is.
        clock: seconds that nobody sets.
    """

    def __init__(self, run: Run, every: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self._clock = run, clock
        usual = REMOTE_SECONDS if is_remote(run) else LOCAL_SECONDS
        self._every = max(LEAST_REMOTE_SECONDS if is_remote(run) else 0.1, every or usual)
        self._next = 0.0
        self.state = State("waiting")
        self.problem = ""
        """Why the last look failed; what is shown is from before."""
        self._changed_at: float | None = None
        self._lease: tuple[Holder, float] | None = None  # as last seen to move, and when
        self._began_with: tuple[int, int | None] | None = None
        self.shards: list[tuple[float, int]] = []
        """When how many shards of an encode job were done, of the last looks at which they were more."""
        self._figures: list[Figure] | None = None  # of a long log they take a while

    def look(self) -> list[str]:
        """Bring it up to date, if it is time. Returns what happened since, one line each."""
        started = self._clock()
        if started < self._next:
            return []
        before, is_first = self.state, self._began_with is None
        known, was = self.run.problems, self.problem
        try:
            news = self._refresh()
            self.problem = ""
        except StorageError as error:
            news, self.problem, self._figures = [], error.message, None
        news += [problem for problem in self.run.problems if problem not in known]
        news += [f"not read now: {self.problem}"] if self.problem and not was else []
        news += ["read again"] if was and not self.problem else []
        took = 0.0 if is_first else self._clock() - started  # the first look reads all there is
        self._next = self._clock() + max(self._every, _REST * took)
        changed = [str(self.state)] if self.state.word not in (before.word, "running") else []
        return news + changed

    @property
    def seconds_left(self) -> float:
        """Until the next look."""
        return max(0.0, self._next - self._clock())

    @property
    def silent(self) -> float | None:
        """Seconds since anything new came; None = nothing has come yet."""
        return None if self._changed_at is None else self._clock() - self._changed_at

    @property
    def figures(self) -> list[Figure]:
        """What is told of it, made anew where something has come."""
        if self._figures is None:
            self._figures = figures(self.run, self.shards)
        return self._figures

    def _refresh(self) -> list[str]:
        run, now = self.run, self._clock()
        if run.refresh():
            self._figures = None
            ago = silence(run, time.time()) if self._changed_at is None else 0.0
            self._changed_at = now - (ago or 0.0)
        news = self._restarts()
        if run.found.kind == "encode":
            done = sum(part.tally.shards for part in run.encoded)
            if not self.shards or self.shards[-1][1] != done:
                self.shards = [*self.shards[-100:], (now, done)]
            gaps = [later - earlier for (earlier, _), (later, _) in pairwise(self.shards)]
            self.state = state_of_encode(run, came=bool(gaps), silent=self.silent or 0.0, usual=max(gaps, default=0.0))
        else:
            holds = self._holder(now) if run.found.kind == "train" and not run.complete else None
            self.state = judge(run, holds, self.silent)
        return news

    def _restarts(self) -> list[str]:
        """Whether the run was started again since the last look: by its starts, or by its log where none are noted."""
        starts, last = len(self.run.starts), self.run.numbers.last_step
        known, self._began_with = self._began_with, (starts, last)
        if known is None or (not known[0] and known[1] is None):  # its first start
            return []
        if not (starts > known[0] if starts else (last or 0) < (known[1] or 0)):
            return []
        if self._changed_at is not None:
            self._changed_at = self._clock()
        start = self.run.starts[-1].get("step") if self.run.starts else last
        return [f"started again, from step {start:,}" if isinstance(start, int) else "started again"]

    def _holder(self, now: float) -> Holder | None:
        """The lease's holder; one elsewhere lives while its lease moves."""
        found = holder_of(self.run)
        if found is None or found.lives is not None or found == UNREAD:
            self._lease = None
            return found
        if self._lease is None or self._lease[0] != found:
            moved = self._lease is not None
            self._lease = (found, now)
            return Holder(found.host, found.pid, True if moved else None, found.counter)
        gone = now - self._lease[1] > max(_WATCHED_SECONDS, 2 * self._every)
        return Holder(found.host, found.pid, False if gone else None, found.counter)


def line(watched: Watched) -> str:
    """All of it in one line of a log."""
    run = watched.run
    parts = []
    if run.found.kind != "encode" and run.numbers.last_step is not None:
        of = f"/{run.target:,} ({percent(share_done(run) or 0.0)})" if run.target else ""
        parts.append(f"step {run.numbers.last_step:,}{of}")
    parts += [f"{figure.name} {figure.value}" for figure in watched.figures if figure.short]
    left = seconds_left(run) if watched.state.word == "running" else None
    parts += [f"{duration(left)} left"] if left else []
    return ", ".join(parts) or watched.state.word
