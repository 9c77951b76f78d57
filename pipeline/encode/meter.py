"""How fast the encode job is, how long it will take, and which of its stages the others wait for."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

Stage = Literal["fetch", "decode", "encode", "upload"]
STAGES: tuple[Stage, ...] = ("fetch", "decode", "encode", "upload")

WINDOW_SECONDS = 30.0
"""Rate and busy shares are those of so many last seconds."""
_MARK_SECONDS = 1.0
_PACE_SECONDS = 300.0  # how far back the time left looks: bytes come in bursts, and speeds change over days


@dataclass(frozen=True)
class Snapshot:
    """A worker's figures at one moment. Shares are of 1.

    Args:
        images: pictures encoded by this run.
        images_per_second: in the last half minute.
        rejected: samples that could not be used, by reason.
        filtered: samples that nobody wanted, by reason.
        shards: source shards done, with those of earlier runs.
        total: source shards of this worker.
        done: as `shards`, with a fraction for what is done of the next ones.
        bytes_read: of the source shards.
        bytes_written: of latent shards and receipts.
        elapsed_seconds: since the run began.
        eta_seconds: until all is done, by bytes of source; None = not known yet.
        busy: share of the last half minute that each stage worked, of all its threads.
        bottleneck: the stage that is busiest; empty before any has worked.
    """

    images: int
    images_per_second: float
    rejected: Mapping[str, int]
    filtered: Mapping[str, int]
    shards: int
    total: int
    done: float
    bytes_read: int
    bytes_written: int
    elapsed_seconds: float
    eta_seconds: float | None
    busy: Mapping[Stage, float]
    bottleneck: Stage | Literal[""]

    def note(self) -> str:
        """The few words behind the progress: `412 images/s, 1.2 % rejected, waiting for decode`.

        At the end the rate is that of the whole run.
        """
        rejects, filtered = sum(self.rejected.values()), sum(self.filtered.values())
        finished = self.shards >= self.total
        rate = self.images / self.elapsed_seconds if finished and self.elapsed_seconds else self.images_per_second
        words = [f"{_round(rate)} images/s"] if self.images else []
        if rejects:  # of all that was seen, as max_reject_rate has it
            words.append(f"{_percent(rejects / (self.images + rejects + filtered))} rejected")
        if filtered:
            words.append(f"{_percent(filtered / (self.images + rejects + filtered))} filtered")
        if self.bottleneck and not finished:
            words.append(f"waiting for {self.bottleneck}")
        return ", ".join(words)


class Meter:
    """Counts what the stages of one worker do. Any thread may call any method; a `busy` span costs about 1 us.

    Args:
        total_bytes: of the source shards that this run is to read.
        total_shards: of this worker, with those that earlier runs have done.
        decoders: threads that decode.
        clock: seconds that only grow.
        uploaders: threads that upload.
        shards_before: shards that earlier runs have done.
    """

    def __init__(
        self,
        total_bytes: int,
        total_shards: int,
        decoders: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        uploaders: int = 1,
        shards_before: int = 0,
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._total_bytes, self._total_shards, self._shards = total_bytes, total_shards, shards_before
        self._pending = total_shards - shards_before
        threads = {"fetch": 1, "decode": decoders, "encode": 1, "upload": uploaders}
        self._started = now = clock()
        self._stages = {stage: _Busy(self._lock, clock, now, threads[stage]) for stage in STAGES}
        self._images = self._read = self._parsed = self._written = 0
        self._most_used = 0.0
        self._rejected: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        self._marks = deque([self._mark(now)])
        self._pace_bytes = self._pace_seconds = 0.0

    def busy(self, stage: Stage) -> AbstractContextManager[None]:
        """A span of one thread's time that this stage worked, rather than waited for another."""
        return self._stages[stage]

    def count(
        self,
        *,
        images: int = 0,
        rejected: Mapping[str, int] | None = None,
        filtered: Mapping[str, int] | None = None,
        read: int = 0,
        parsed: int = 0,
        written: int = 0,
        shards: int = 0,
    ) -> None:
        """Add to the counts.

        Args:
            images: pictures encoded.
            rejected: samples that could not be used, by reason.
            filtered: samples that nobody wanted, by reason.
            read: bytes of source shards.
            parsed: samples found in them. Those that are in line for the encoder are not done with, so that without
                this count the time left is told too short by as much as is read ahead.
            written: bytes of latent shards.
            shards: source shards done.
        """
        with self._lock:
            self._parsed += parsed
            self._images += images
            self._read += read
            self._written += written
            self._shards += shards
            if rejected:
                self._rejected.update(rejected)
            if filtered:
                self._filtered.update(filtered)
            self._note_time(self._clock())

    def snapshot(self) -> Snapshot:
        """The figures of now."""
        with self._lock:
            now = self._clock()
            self._note_time(now)
            busy, rate = self._shares(self._mark(now))
            bottleneck = max(STAGES, key=busy.__getitem__)
            return Snapshot(
                images=self._images,
                images_per_second=rate,
                rejected=dict(self._rejected),
                filtered=dict(self._filtered),
                shards=self._shards,
                total=self._total_shards,
                done=self._done(),
                bytes_read=self._read,
                bytes_written=self._written,
                elapsed_seconds=now - self._started,
                eta_seconds=self._eta(),
                busy=busy,
                bottleneck=bottleneck if busy[bottleneck] else "",
            )

    def _note_time(self, now: float) -> None:
        """Once a second: a mark that later rates are taken from, and the pace of the bytes."""
        last = self._marks[-1]
        seconds = now - last.time
        if seconds < _MARK_SECONDS:
            return
        fading = math.exp(-seconds / _PACE_SECONDS)
        self._pace_bytes = self._pace_bytes * fading + self._used() - last.used
        self._pace_seconds = self._pace_seconds * fading + seconds
        self._marks.append(self._mark(now))
        while len(self._marks) > 1 and self._marks[1].time <= now - WINDOW_SECONDS:
            self._marks.popleft()

    def _mark(self, now: float) -> _Mark:
        return _Mark(now, self._images, self._used(), tuple(self._stages[stage].until(now) for stage in STAGES))

    def _used(self) -> float:
        """Bytes of source that are done with: those read, less the part of the samples that are still in line."""
        finished = self._images + self._rejected.total() + self._filtered.total()
        used = self._read * min(finished / self._parsed, 1.0) if self._parsed else float(self._read)
        self._most_used = max(self._most_used, used)  # the share of what is in line grows at first
        return self._most_used

    def _shares(self, now: _Mark) -> tuple[dict[Stage, float], float]:
        """Busy shares and pictures per second since the window's first mark."""
        first = self._marks[0]
        seconds = now.time - first.time
        if seconds <= 0:
            return dict.fromkeys(STAGES, 0.0), 0.0
        busy = {
            stage: min((after - before) / seconds / self._stages[stage].threads, 1.0)
            for stage, before, after in zip(STAGES, first.busy, now.busy, strict=True)
        }
        return busy, (now.images - first.images) / seconds

    def _done(self) -> float:
        """Never a whole shard ahead of what is stored."""
        before = self._total_shards - self._pending
        used = before + self._pending * self._used() / self._total_bytes if self._total_bytes else 0.0
        return min(max(used, self._shards), self._shards + 0.99, max(self._total_shards, self._shards))

    def _eta(self) -> float | None:
        if self._shards >= self._total_shards:
            return 0.0
        left = self._total_bytes - self._used()
        if self._parsed and not self._images:  # models are still warming up
            return None
        return left * self._pace_seconds / self._pace_bytes if left > 0 and self._pace_bytes else None


class _Mark(NamedTuple):
    time: float
    images: int
    used: float  # bytes
    busy: tuple[float, ...]  # thread-seconds of each stage


class _Busy(AbstractContextManager[None]):
    """The thread-seconds of one stage; enters and leaves for any number of threads at once."""

    def __init__(self, lock: threading.Lock, clock: Callable[[], float], now: float, threads: int) -> None:
        self.threads = threads
        self._lock, self._clock = lock, clock
        self._seconds, self._since, self._active = 0.0, now, 0

    def until(self, now: float) -> float:
        """The thread-seconds so far, with those of open spans. The lock is held by the caller."""
        return self._seconds + self._active * (now - self._since)

    def __enter__(self) -> None:
        with self._lock:
            now = self._clock()
            self._seconds += self._active * (now - self._since)
            self._since = now
            self._active += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            now = self._clock()
            self._seconds += self._active * (now - self._since)
            self._since = now
            self._active -= 1


def _round(rate: float) -> str:
    return f"{rate:.1f}" if 0 < rate < 10 else f"{rate:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"
