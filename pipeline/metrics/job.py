"""The numbers of one job in one process, and where they go: Prometheus, a JSON-lines log, trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from pipeline.config import MetricsConfig, TrackedMetricsConfig
from pipeline.console import tell
from pipeline.errors import LatheError, SetupError
from pipeline.metrics.discovery import Announcement
from pipeline.metrics.log import LogStore, open_log, plain
from pipeline.metrics.numbers import Numbers, Traffic
from pipeline.metrics.place import Place
from pipeline.metrics.pushing import Pusher
from pipeline.metrics.serving import Server
from pipeline.metrics.table import Job, Scope, Value, flat
from pipeline.metrics.trackers import Trackers
from pipeline.stopping import when_stopped


class Metrics:
    """The numbers of one job in one process. Leaving it as a context closes it.

    Every process serves what is local; of a training's global numbers rank 0 alone serves and logs, and on others
    telling them is free and does nothing.

    Args:
        config: where to serve and to push them.
        job: whose metrics of the table these are.
        place: which process of the run this is.
        log_store: where the JSON-lines log is kept; None = no log, and no trackers.
        about: the run file, for trackers.
        traffic: what was asked of storage, `pipeline.storage.counters`; None = it is not told.

    Raises:
        SetupError: the metrics server's address cannot be bound; a tracker is not installed.
        ConfigError: a tracker cannot write where it would.
    """

    def __init__(
        self,
        config: MetricsConfig,
        job: Job,
        place: Place | None = None,
        *,
        log_store: LogStore | None = None,
        about: Mapping[str, Any] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self._job, self._place = job, place or Place()
        is_main = job == "encode" or self._place.number == 0
        scopes: tuple[Scope, ...] = ("global", "local") if is_main else ("local",)
        self._numbers = Numbers(job, scopes, traffic)
        self.registry = CollectorRegistry()
        self.registry.register(self._numbers)
        self._log = open_log(log_store) if log_store is not None and is_main else None
        self._noted: dict[str, float] = {}
        self._trackers: Trackers | None = None
        if isinstance(config, TrackedMetricsConfig) and log_store is not None and is_main:
            self._trackers = Trackers(config, log_store, about or {})
        self._server = self._serve(config) if config.prometheus else None
        self._announcement: Announcement | None = None
        self._pusher: Pusher | None = None
        self._forget_stop = when_stopped(partial(self._take_back, stopped=True))
        self._tell_of_itself(config)

    @property
    def address(self) -> str:
        """Of the server, for a person; empty where there is none."""
        return self._server.address if self._server is not None else ""

    def set(self, key: str, value: float, **labels: str) -> None:
        """Set one metric by its short key and, where the table gives it labels, a value for each of them.

        Raises:
            KeyError: the table has no such key for this job.
            ValueError: not the labels of the table.
        """
        self._numbers.set(key, value, labels)

    def note(self, key: str, value: float) -> None:
        """Set one metric without labels, and write it with the next line of the log; call it where `log` is called."""
        self.set(key, value)
        self._noted[key] = value

    def add(self, key: str, amount: float, **labels: str) -> None:
        """Count further, see `set`."""
        self._numbers.add(key, amount, labels)

    def forget(self, key: str) -> None:
        """A gauge is not known any more: it is not told until it is set again."""
        self._numbers.forget(key)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Set several metrics and write them as one line of the log: `{"step", "time", **values}`, with those noted.

        Of a metric with labels, those that `values` lacks are not told any more, so that Prometheus has what the
        line has.
        """
        now = time.time()
        values, self._noted = {**self._noted, **values}, {}
        for key, value in values.items():
            self._numbers.replace(key, value)
        if self._log is not None:
            line = {"step": step, "time": round(now, 3), **{k: plain(v) for k, v in values.items()}}
            self._log.append(step, json.dumps(line))
        if self._trackers is not None:
            numbers = {"/".join((key, *labels)): n for key, value in values.items() for labels, n in flat(value)}
            self._trackers.scalars(step, numbers)

    def show(self, step: int, name: str, *, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]) -> None:
        """Pictures [N, H, W, 3] and a PNG file of all of them, for trackers."""
        if self._trackers is not None:
            self._trackers.pictures(step, name, sheet, pictures, captions)

    def resume(self, step: int) -> int:
        """Drop the lines that a killed run logged after `step`, its last checkpoint. Call it once, before `log`.

        Returns:
            how many starts of the run the log tells of, which has `restarts` in its lines; 0 where there is no log.
        """
        starts = 0
        if self._log is not None:
            starts = self._log.starts()
            self._log.drop_after(step)
        if self._trackers is not None:
            self._trackers.start(step)
        return starts

    def flush(self) -> None:
        """Make every line so far durable; called with each checkpoint. Raises StorageError."""
        if self._log is not None:
            self._log.flush()

    def close(
        self, *, failed: bool = False, stopped: bool = False, hurried: Callable[[], bool] = lambda: False
    ) -> None:
        """Flush the log, stop the server, and take back what Prometheus was told of this process.

        Args:
            failed: what it was told stays, so that somebody notices.
            stopped: the process was asked to end, and has no time to wait for a scrape.
            hurried: whether it is asked to while it waits for one.
        """
        try:
            if self._trackers is not None:
                self._trackers.close()
            self._trackers = None
            self.flush()
        except LatheError:
            failed = True
            raise
        finally:
            if failed:
                self._forget_stop()
            self._take_back(failed=failed, stopped=stopped and not failed, hurried=hurried)
            self._forget_stop()
            if self._server is not None:
                self._server.close()
            self._server = self._announcement = self._pusher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asked_to = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close(failed=kind is not None and not asked_to, stopped=asked_to)

    def _take_back(
        self, *, failed: bool = False, stopped: bool = False, hurried: Callable[[], bool] = lambda: False
    ) -> None:
        """What Prometheus was told of this process; see `close`. What takes no time comes first."""
        announcement, pusher = self._announcement, self._pusher
        if announcement is not None:
            announcement.close(failed=failed, stopped=stopped)
        if pusher is not None:
            pusher.close(failed=failed, stopped=stopped, hurried=hurried)

    def _serve(self, config: MetricsConfig) -> Server | None:
        try:
            return Server(config, self.registry, self._place.local)
        except SetupError as error:
            if self._place.number == 0:
                raise
            tell(f"metrics: those of rank {self._place.number} are not served: {error.message}")
            return None

    def _tell_of_itself(self, config: MetricsConfig) -> None:
        labels = self._place.labels(self._job, config.run)
        if config.discovery is not None and self._server is not None:
            self._announcement = Announcement(
                config.discovery, job=self._job, place=self._place, labels=labels, targets=self._server.targets
            )
            self._announcement.start()  # once it is known to whoever stops us
            if self._server.is_loopback and self._place.local == 0 < self._place.number:  # there may be other machines
                tell(f"metrics: only a Prometheus on this machine finds {config.host}: set metrics.host=0.0.0.0")
        if config.pushgateway is not None:
            # a worker that goes on elsewhere is the same to the gateway, which forgets nothing by itself
            group = {name: value for name, value in labels.items() if name != "host"}
            self._pusher = Pusher(
                config.pushgateway, self.registry, group, linger_seconds=config.pushgateway_linger_seconds
            )
