"""The numbers of one job in one process, and where they go: Prometheus, a JSON-lines log, trackers."""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from pipeline.config import MetricsConfig, TrackedMetricsConfig
from pipeline.errors import SetupError
from pipeline.metrics.log import LogStore, open_log, plain
from pipeline.metrics.table import DEFINITIONS, Job, Value, flat
from pipeline.metrics.trackers import Trackers


class Metrics:
    """The numbers of one job in one process.

    Args:
        config: whether and where to serve them to Prometheus.
        job: whose metrics of the table these are.
        rank: only rank 0 serves and logs; on others every call is free and does nothing.
        log_store: where the JSON-lines log is kept; None = no log, and no trackers.
        about: the run file, for trackers.

    Raises:
        SetupError: the metrics server's address cannot be bound; a tracker is not installed.
        ConfigError: a tracker cannot write where it would.
    """

    def __init__(
        self,
        config: MetricsConfig,
        job: Job,
        rank: int = 0,
        log_store: LogStore | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {
            d.key: Gauge(d.name(job), f"{d.help} ({d.unit})", d.labels, registry=self.registry)
            for d in DEFINITIONS
            if job in d.jobs
        }
        self._labels = {d.key: d.labels for d in DEFINITIONS if job in d.jobs}
        self._active = rank == 0
        self._log = open_log(log_store) if log_store is not None and self._active else None
        self._trackers: Trackers | None = None
        if isinstance(config, TrackedMetricsConfig) and log_store is not None and self._active:
            self._trackers = Trackers(config, log_store, about or {})
        self._server: Any = None
        self.address = ""
        if config.prometheus and self._active:
            self._server, self.address = _serve(config, self.registry)

    def set(self, key: str, value: float, **labels: str) -> None:
        """Set one metric by its short key and, where the table gives it labels, a value for each of them.

        Raises:
            KeyError: the table has no such key for this job.
            ValueError: not the labels of the table.
        """
        gauge = self._gauges[key]
        if labels:
            gauge = gauge.labels(**labels)
        if self._active:
            gauge.set(value)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Set several metrics and write them as one line of the log: `{"step", "time", **values}`."""
        now = time.time()
        numbers = {(key, *labels): number for key, value in values.items() for labels, number in flat(value)}
        for (key, *labels), number in numbers.items():
            self.set(key, number, **dict(zip(self._labels[key], labels, strict=True)))
        if self._log is not None:
            line = {"step": step, "time": round(now, 3), **{k: plain(v) for k, v in values.items()}}
            self._log.append(step, json.dumps(line))
        if self._trackers is not None:
            self._trackers.scalars(step, {"/".join(name): number for name, number in numbers.items()})

    def show(self, step: int, name: str, *, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]) -> None:
        """Pictures [N, H, W, 3] and a PNG file of all of them, for trackers."""
        if self._trackers is not None:
            self._trackers.pictures(step, name, sheet, pictures, captions)

    def resume(self, step: int) -> None:
        """Drop the lines that a killed run logged after `step`, its last checkpoint. Call it once, before `log`."""
        if self._log is not None:
            self._log.drop_after(step)
        if self._trackers is not None:
            self._trackers.start(step)

    def flush(self) -> None:
        """Make every line so far durable; called with each checkpoint. Raises StorageError."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Flush the log and stop the server."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._trackers is not None:
            self._trackers.close()
        self.flush()


def _serve(config: MetricsConfig, registry: CollectorRegistry) -> tuple[Any, str]:
    """Start the HTTP server on the first free port from `config.port` on; port 0 lets the system choose."""
    ports = range(config.port, min(config.port + 100, 65536)) if config.port else (0,)
    problem: OSError | None = None
    for port in ports:
        try:
            server, _ = start_http_server(port, config.host, registry)
        except socket.gaierror as error:
            problem = error
            break
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
        else:
            host = f"[{config.host}]" if ":" in config.host else config.host
            return server, f"http://{host}:{server.server_port}/metrics"
    raise SetupError(
        f"metrics.host={config.host}, metrics.port={config.port}: {problem.strerror if problem else 'no port is free'}",
        "choose another metrics.port or metrics.host, or set metrics.prometheus=false",
    ) from problem
