"""Tells a worker's figures once a second: to Prometheus, and to whoever watches the progress."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pipeline.encode.meter import Meter, Snapshot
from pipeline.encode.tally import REASONS, unwanted
from pipeline.memory import resident
from pipeline.metrics import Metrics

PERIOD_SECONDS = 1.0


class Reporter:
    """Figures from a thread of its own, so that they move while a batch takes long. Use it in a `with` statement.

    Args:
        meter: what is measured.
        metrics: of the job "encode".
        on_progress: called at the start, once a second and at the end, from one thread at a time.
        period_seconds: between two reports.
    """

    def __init__(
        self,
        meter: Meter,
        metrics: Metrics,
        on_progress: Callable[[Snapshot], None] | None = None,
        period_seconds: float = PERIOD_SECONDS,
    ) -> None:
        self._meter, self._metrics, self._on_progress = meter, metrics, on_progress
        self._period_seconds = period_seconds
        self._shards = meter.snapshot().shards
        self._told: Counter[tuple[str, str]] = Counter()  # key and reason
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def __enter__(self) -> Self:
        for reason in REASONS:  # `increase` does not see a series begin
            self._metrics.add("filtered" if unwanted(reason) else "rejects", 0, reason=reason)
        self._report()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._report()

    def _run(self) -> None:
        while not self._ended.wait(self._period_seconds):
            self._report()

    def _report(self) -> None:
        snapshot = self._meter.snapshot()
        self._publish(snapshot)
        if self._on_progress is not None:
            self._on_progress(snapshot)

    def _publish(self, now: Snapshot) -> None:
        metrics = self._metrics
        metrics.set("images_per_second", now.images_per_second)
        metrics.set("shards_done", now.shards)
        metrics.set("target_shards", now.total)
        metrics.set("finished", now.shards >= now.total)
        if now.eta_seconds is None:
            metrics.forget("eta_seconds")
        else:
            metrics.set("eta_seconds", now.eta_seconds)
        for key, size in resident().items():
            metrics.set(key, size)
        totals = {"images": now.images, "read_bytes": now.bytes_read, "written_bytes": now.bytes_written}
        for key, total in totals.items():
            metrics.add(key, self._new(key, total))
        for key, by_reason in {"rejects": now.rejected, "filtered": now.filtered}.items():
            for reason, total in by_reason.items():
                metrics.add(key, self._new(key, total, reason), reason=reason)
        for stage, share in now.busy.items():
            metrics.set("busy_ratio", share, stage=stage)
        if now.shards != self._shards:
            self._shards = now.shards
            metrics.set("last_commit_timestamp_seconds", time.time())

    def _new(self, key: str, total: int, reason: str = "") -> int:
        """What a total has grown by since it was told."""
        before, self._told[key, reason] = self._told[key, reason], total
        return total - before
