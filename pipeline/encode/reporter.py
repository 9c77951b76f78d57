"""Tells a worker's figures once a second: to Prometheus, and to whoever watches the progress."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psutil

from pipeline.encode.meter import Meter, Snapshot
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
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)

    def __enter__(self) -> Self:
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
        metrics.set("images", now.images)
        metrics.set("images_per_second", now.images_per_second)
        metrics.set("read_bytes", now.bytes_read)
        metrics.set("written_bytes", now.bytes_written)
        metrics.set("shards_done", now.shards)
        metrics.set("target_shards", now.total)
        metrics.set("eta_seconds", math.nan if now.eta_seconds is None else now.eta_seconds)
        metrics.set("resident_memory_bytes", self._process.memory_info().rss)
        for reason, count in now.rejected.items():
            metrics.set("rejects", count, reason=reason)
        for reason, count in now.filtered.items():
            metrics.set("filtered", count, reason=reason)
        for stage, share in now.busy.items():
            metrics.set("busy_ratio", share, stage=stage)
        if now.shards != self._shards:
            self._shards = now.shards
            metrics.set("last_commit_timestamp_seconds", time.time())
