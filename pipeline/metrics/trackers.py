"""TensorBoard and Weights & Biases: the numbers of the log, and pictures, for those who look at curves."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TrackedMetricsConfig, WandbConfig
from pipeline.console import tell
from pipeline.errors import ConfigError, SetupError, StorageError
from pipeline.metrics.log import LogStore

FOLDER = "tensorboard"
"""Where TensorBoard's files lie in a run's output, where nothing else is said."""
WANDB_ID = "wandb-run.txt"
"""Where the output keeps the id of its run at Weights & Biases."""
_REMOTE = "://"


class Tracker(Protocol):
    """Something that draws curves. Its methods may raise anything."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Trackers.scalars`."""

    def pictures(
        self, step: int, name: str, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]
    ) -> None:
        """See `Trackers.pictures`."""

    def close(self) -> None:
        """Nothing more comes."""


class Trackers:
    """The trackers that a run file asks for. One that fails is told of once and left alone; training goes on.

    Args:
        config: which.
        store: the run's output.
        about: the run file, for those who compare runs.

    Raises:
        SetupError: one is not installed.
        ConfigError: TensorBoard's files cannot lie where they would.
    """

    def __init__(self, config: TrackedMetricsConfig, store: LogStore, about: Mapping[str, Any]) -> None:
        self._openers: list[tuple[str, Callable[[int], Tracker]]] = []
        self._open: list[Tracker] = []
        if config.tensorboard:
            folder = _folder(config.tensorboard, store)
            _check_installed("tensorboard", "metrics.tensorboard", "false")
            self._openers.append(("TensorBoard", lambda step: _TensorBoard(folder, step)))
        if (chosen := config.wandb) is not None:
            _check_installed("wandb", "metrics.wandb", "null")
            self._openers.append(("Weights & Biases", lambda _step: _Wandb(chosen, store, about)))

    def start(self, step: int) -> None:
        """Before the first step of this start; `step` were done before, and what was told of later ones is void."""
        for name, opener in self._openers:
            try:
                self._open.append(opener(step))
            except Exception as error:  # whatever a library raises, training goes on
                _give_up(name, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step, by names such as "loss" or "validation_loss/main"."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def pictures(
        self, step: int, name: str, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]
    ) -> None:
        """Pictures [N, H, W, 3] after a step, and all of them on one sheet, a PNG file."""
        self._each(lambda tracker: tracker.pictures(step, name, sheet, pictures, captions))

    def close(self) -> None:
        """Nothing more comes."""
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for tracker in list(self._open):
            try:
                work(tracker)
            except Exception as error:
                self._open.remove(tracker)
                _give_up(tracker.name, error)


def _give_up(name: str, error: Exception) -> None:
    said = str(error).strip().splitlines()
    tell(f"{name} is told nothing more: {said[0] if said else type(error).__name__}; training goes on")


def _check_installed(package: str, field: str, off: str) -> None:
    if find_spec(package) is None:
        raise SetupError(
            f"{field}: set, but {package} is not installed", f"pip install {package}, or set {field}={off}"
        )


def _folder(asked: bool | str, store: LogStore) -> Path:
    url = f"{store.url}/{FOLDER}" if asked is True else str(asked)
    if _REMOTE in url:
        raise ConfigError(
            f"metrics.tensorboard: its files would lie in {url}, where nothing can be appended to",
            "set metrics.tensorboard to a local folder",
        )
    return Path(url)


class _TensorBoard:
    """An event file, written in this thread: torch's SummaryWriter has one of its own, and with it its failures.

    Args:
        folder: where it lies, beside those of earlier starts.
        step: steps done; what earlier files say of later ones is void, by their own format.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        seconds, rest = divmod(time.time_ns(), 10**9)  # names tell the order of files
        name = f"events.out.tfevents.{seconds}.{rest:09}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(step + 1, file_version="brain.Event:2")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def pictures(
        self, step: int, name: str, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]
    ) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", sheet[16:24])  # of a PNG's first chunk
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=sheet)
        self._write(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        self._file.flush()


class _Wandb:
    """A run at Weights & Biases, one for each output, however often it is started.

    What it was told of a step it keeps: after a restart the steps that are done once more are passed over by it.
    """

    name = "Weights & Biases"

    def __init__(self, config: WandbConfig, store: LogStore, about: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.project,
            name=config.name,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags) or None,
            mode=config.mode,
            dir=None if _REMOTE in store.url else store.url,
            id=_wandb_id(store),
            resume="allow",
            config=dict(about),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(
        self, step: int, name: str, sheet: bytes, pictures: NDArray[np.uint8], captions: Sequence[str]
    ) -> None:
        shown = [self._wandb.Image(one, caption=said) for one, said in zip(pictures, captions, strict=True)]
        self._run.log({name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(store: LogStore) -> str:
    """The output's own, made at its first start."""
    try:
        return store.read(WANDB_ID).decode().strip()
    except StorageError:
        made = secrets.token_hex(8)
        store.write(WANDB_ID, made.encode())
        return made
