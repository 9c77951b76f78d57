"""Every number Lathe reports, in one table, and where the numbers go: Prometheus and a JSON-lines log.

A metric is known by its short key (`loss`) in calls and in the log, and by its full name (`lathe_train_loss`) to
Prometheus. All are gauges: totals are restored after a restart, and a restored counter reads as a jump in `rate()`.
"""

from __future__ import annotations

import errno
import json
import math
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from pipeline.config import MetricsConfig
from pipeline.errors import SetupError, StorageError

Job = Literal["train", "first_stage", "encode"]
TRAINING: tuple[Job, ...] = ("train", "first_stage")
ENCODE: tuple[Job, ...] = ("encode",)

LOG = "metrics.jsonl"
"""The log's name in a folder, which can be appended to."""
PARTS = "metrics/"
"""Where the log's parts go on S3, where nothing can be appended to: `metrics/00000001.jsonl`, by first step."""


@dataclass(frozen=True)
class Definition:
    """One metric: its key in calls and log, its unit, what it means, the jobs that report it, and its labels."""

    key: str
    unit: str
    help: str
    jobs: tuple[Job, ...]
    labels: tuple[str, ...] = ()

    def name(self, job: Job) -> str:
        """The full name that Prometheus knows, such as `lathe_train_loss`."""
        return f"lathe_{job}_{self.key}"


DEFINITIONS = (
    Definition("step", "steps", "Optimizer steps done, over all restarts", TRAINING),
    Definition("target_steps", "steps", "Optimizer steps after which the run is finished", TRAINING),
    Definition("epoch", "epochs", "Epochs of the data set seen, with fraction", TRAINING),
    Definition("samples_seen", "samples", "Samples trained on, over all restarts and ranks", TRAINING),
    Definition("loss", "1", "Training loss, mean over the logging interval and all ranks", TRAINING),
    Definition("reconstruction_loss", "1", "Reconstruction term of the loss", ("first_stage",)),
    Definition("kl_loss", "nats", "KL divergence to the standard normal, per latent element", ("first_stage",)),
    Definition("psnr_db", "dB", "Reconstruction PSNR of the last training batch", ("first_stage",)),
    Definition("holdout_psnr_db", "dB", "Reconstruction PSNR of held-out pictures", ("first_stage",)),
    Definition("learning_rate", "1", "Learning rate of the last step", TRAINING),
    Definition("gradient_norm", "1", "L2 norm of the last step's gradient before clipping", TRAINING),
    Definition("skipped_steps", "steps", "Steps skipped because loss or gradient was not finite", ("train",)),
    Definition("skipped_blocks", "blocks", "Damaged blocks of latents that do not count, of rank 0", ("train",)),
    Definition("step_seconds", "s", "Wall time of a step, mean over the logging interval", TRAINING),
    Definition(
        "data_wait_seconds", "s", "Time a step waited for its batch, mean over the logging interval", ("train",)
    ),
    Definition("checkpoint_seconds", "s", "Wall time of the last checkpoint, until it was stored", TRAINING),
    Definition("checkpoint_stall_seconds", "s", "Time that training stood still for the last checkpoint", ("train",)),
    Definition("checkpoint_failures", "saves", "Checkpoints and snapshots of this start that failed", ("train",)),
    Definition("checkpoint_bytes", "bytes", "Size of the last checkpoint, all files", TRAINING),
    Definition("checkpoint_step", "steps", "Step of the last complete checkpoint", TRAINING),
    Definition("checkpoint_timestamp_seconds", "s", "Unix time of the last complete checkpoint", TRAINING),
    Definition("last_step_timestamp_seconds", "s", "Unix time of the last step that was logged", TRAINING),
    Definition("world_size", "ranks", "Training processes", ("train",)),
    Definition("images_per_second", "images/s", "Images trained on per second, over all ranks", TRAINING),
    Definition("images", "images", "Images that this run of the worker has encoded", ENCODE),
    Definition("images_per_second", "images/s", "Images that this worker encoded per second, last 30 s", ENCODE),
    Definition("rejects", "samples", "Samples of this run that could not be used, by reason", ENCODE, ("reason",)),
    Definition("filtered", "samples", "Samples of this run that nobody wanted, by reason", ENCODE, ("reason",)),
    Definition("bytes_read", "bytes", "Bytes of source shards that this run of the worker has read", ENCODE),
    Definition("bytes_written", "bytes", "Bytes of latent shards that this run of the worker has stored", ENCODE),
    Definition("shards_done", "shards", "Source shards of this worker that are done, over all restarts", ENCODE),
    Definition("target_shards", "shards", "Source shards of this worker", ENCODE),
    Definition("eta_seconds", "s", "Time until this worker is done, by bytes of source; NaN = not known yet", ENCODE),
    Definition("busy_ratio", "1", "Share of the last 30 s that a stage worked, of all its threads", ENCODE, ("stage",)),
    Definition("storage_retries", "requests", "Requests to storage that this run of the worker repeated", ENCODE),
    Definition("last_commit_timestamp_seconds", "s", "Unix time of the last source shard that was done", ENCODE),
    Definition("resident_memory_bytes", "bytes", "Resident memory of this process", (*TRAINING, *ENCODE)),
)


class LogStore(Protocol):
    """The part of `pipeline.storage.Store` that the log needs."""

    @property
    def url(self) -> str: ...  # noqa: D102
    def read(self, name: str) -> bytes: ...  # noqa: D102
    def write(self, name: str, data: bytes) -> bool: ...  # noqa: D102
    def list(self, prefix: str = "") -> Sequence[Any]: ...  # noqa: D102
    def delete(self, names: Iterable[str]) -> None: ...  # noqa: D102


class Metrics:
    """The numbers of one job in one process.

    Args:
        config: whether and where to serve them to Prometheus.
        job: whose metrics of the table these are.
        rank: only rank 0 serves and logs; on others every call is free and does nothing.
        log_store: where the JSON-lines log is kept; None = no log.

    Raises:
        SetupError: the metrics server's address cannot be bound.
    """

    def __init__(self, config: MetricsConfig, job: Job, rank: int = 0, log_store: LogStore | None = None) -> None:
        self.registry = CollectorRegistry()
        self._gauges = {
            d.key: Gauge(d.name(job), f"{d.help} ({d.unit})", d.labels, registry=self.registry)
            for d in DEFINITIONS
            if job in d.jobs
        }
        self._active = rank == 0
        self._log = _open_log(log_store) if log_store is not None and self._active else None
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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set several metrics and write them as one line of the log: `{"step", "time", **values}`."""
        now = time.time()
        for key, value in values.items():
            self.set(key, value)
        if self._log is not None:
            line = {"step": step, "time": round(now, 3), **{k: _plain(v) for k, v in values.items()}}
            self._log.append(step, json.dumps(line))

    def resume(self, step: int) -> None:
        """Drop the lines that a killed run logged after `step`, its last checkpoint. Call it once, before `log`."""
        if self._log is not None:
            self._log.drop_after(step)

    def flush(self) -> None:
        """Make every line so far durable; called with each checkpoint, from any thread. Raises StorageError."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Flush the log and stop the server."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.flush()


def read_log(store: LogStore) -> list[dict[str, Any]]:
    """The lines of a run's log in order of step. A line torn by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for name in _log_files(store):
        for text in store.read(name).decode().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


def _log_files(store: LogStore) -> list[str]:
    if _can_append(store):
        return [LOG] if (Path(store.url) / LOG).exists() else []
    return sorted(e.name for e in store.list(PARTS))


def _can_append(store: LogStore) -> bool:
    return "://" not in store.url


def _encode(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _plain(value: float) -> float | int | None:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


class _FolderLog:
    """One file, appended to line by line, so that a reader sees each line at once.

    A line that the disk does not take waits for the next one: `flush` alone raises.
    """

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self._path = Path(store.url) / LOG
        self._file: IO[bytes] | None = None
        self._waiting = b""
        self._lock = threading.Lock()

    def append(self, _step: int, line: str) -> None:
        with self._lock:
            self._waiting += f"{line}\n".encode()
            with suppress(OSError):
                self._write()

    def drop_after(self, step: int) -> None:
        kept = [line for line in read_log(self._store) if line["step"] <= step]
        self._store.write(LOG, _encode(kept))

    def flush(self) -> None:
        with self._lock:
            try:
                self._write()
                if self._file is not None:
                    self._file.close()
            except OSError as error:
                raise StorageError(
                    f"{self._path}: {error.strerror}", "make room or mend the folder's rights"
                ) from error
            self._file = None

    def _write(self) -> None:
        while self._waiting:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            self._waiting = self._waiting[self._file.write(self._waiting) :]  # a disk that fills up takes a part


class _PartsLog:
    """Parts that are written whole: each holds the lines between two checkpoints and bears its first step."""

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self._lines: list[tuple[int, str]] = []

    def append(self, step: int, line: str) -> None:
        self._lines.append((step, line))

    def drop_after(self, step: int) -> None:
        for name in reversed(_log_files(self._store)):
            lines = [json.loads(text) for text in self._store.read(name).splitlines()]
            kept = [line for line in lines if line["step"] <= step]
            if len(kept) == len(lines):
                break
            if kept:
                self._store.write(name, _encode(kept))
            else:
                self._store.delete([name])

    def flush(self) -> None:
        lines = list(self._lines)
        if lines:
            self._store.write(f"{PARTS}{lines[0][0]:08d}.jsonl", "".join(f"{line}\n" for _, line in lines).encode())
            del self._lines[: len(lines)]  # others were appended meanwhile


def _open_log(store: LogStore) -> _FolderLog | _PartsLog:
    return _FolderLog(store) if _can_append(store) else _PartsLog(store)


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
