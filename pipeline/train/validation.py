"""Validation in the midst of training, which does not notice: losses of held-out samples, pictures of fixed prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

from torch import nn

from pipeline.config import RAW, TrainConfig
from pipeline.console import duration
from pipeline.data import images
from pipeline.data.datasets import DataSets
from pipeline.data.prepare import Scale
from pipeline.errors import StorageError
from pipeline.metrics import Metrics
from pipeline.models.conditioning import FrozenTowers
from pipeline.models.unet import TextToImage
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train import sharded
from pipeline.train.checkpoint import step_name
from pipeline.train.grids import Grids
from pipeline.train.held_out_losses import HeldOutLosses, Losses
from pipeline.train.optimizer import average_key
from pipeline.train.telling import say

PICTURES = "samples/"
"""Where in a run's output the sheets of pictures lie."""
_COLUMNS = 8


class _InterruptedError(Exception):
    """One of the ranks was asked to stop; raised on all of them at the same place."""


class Validator:
    """Validates a run; all ranks call it alike.

    Args:
        config: the run file.
        ranks: this rank among the others.
        engine: that trains.
        datasets: the latents.
        scale: how they are whitened.
        batch_size: samples of a forward pass: a micro batch of the training, which fits.
        towers: that run while training; None = none do.
        metrics: where numbers and pictures go.
        store: the run's output.
        stopped: whether this process was asked to stop.

    Raises:
        ConfigError, DataError, StorageError: held-out samples or the autoencoder cannot be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Process,
        engine: Engine,
        *,
        datasets: DataSets,
        scale: Scale,
        batch_size: int,
        towers: FrozenTowers | None,
        metrics: Metrics,
        store: Store,
        stopped: Callable[[], bool],
    ) -> None:
        self._config, self._settings, self._ranks, self._engine = config, config.validation, ranks, engine
        self._metrics, self._store, self._stopped = metrics, store, stopped
        first = [average.name for average in config.ema.averages][:1]
        self._weights = config.validation.weights or (*first, RAW)
        self._passes = 0  # forward passes of all validations
        self._held_out: HeldOutLosses
        self._grids: Grids | None = None

        def read() -> None:
            self._held_out = HeldOutLosses(config, ranks, datasets, scale, batch_size=batch_size, towers=towers)
            if config.validation.prompts:
                together = max(1, batch_size // 2)  # guidance runs each of them twice
                manifest = datasets.manifests[0]
                self._grids = Grids(config, ranks, manifest, scale, batch_size=together, towers=towers)

        sharded.together(ranks, read)

    def due(self, step: int) -> bool:
        """Whether the run is validated after `step` steps."""
        every = self._settings.every
        return every is not None and step > 0 and (step % every == 0 or step == self._config.steps)

    def run(self, step: int) -> None:
        """Validate after `step` steps: log the figures, and write the pictures to `samples/`.

        Where a rank is asked to stop meanwhile, all leave it soon, and nothing is logged.
        """
        started = time.perf_counter()
        try:
            with _evaluating(self._engine.module):
                found = {}
                for name in self._weights:
                    with self._using(name):
                        found[name] = self._held_out.of(self._engine.module, self._go_on)
                seconds = time.perf_counter() - started
                self._metrics.log(step, {**_values(found), "validation_seconds": seconds})
                say(_told(step, found, seconds))
                if self._grids is not None:
                    self._make_pictures(self._grids, step)
        except _InterruptedError:
            say(f"validation after step {step} was broken off")

    def _make_pictures(self, grids: Grids, step: int) -> None:
        with self._using(self._weights[0]):
            pictures = grids.make(cast(TextToImage, self._engine.module), self._go_on)
        if not self._ranks.is_main:
            return
        prompts, name = self._settings.prompts, f"{PICTURES}{step_name(step)}.png"
        sheet = images.contact_sheet(pictures, _COLUMNS, prompts)
        try:
            self._store.write(name, sheet)
        except StorageError as error:
            say(f"{name} could not be written: {error}")
        self._metrics.show(step, "samples", sheet=sheet, pictures=pictures, captions=prompts)

    def _using(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if name == RAW else self._engine.using(average_key(name))

    def _go_on(self) -> None:
        """Before each forward pass, on all ranks."""
        self._passes += 1
        self._ranks.watch.note(f"validates, pass {self._passes}")
        if self._ranks.any(self._stopped()):
            raise _InterruptedError


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and every part of it in the mode of before afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _values(found: Mapping[str, Losses]) -> dict[str, Mapping[str, float] | Mapping[str, Mapping[str, float]]]:
    values: dict[str, Mapping[str, float] | Mapping[str, Mapping[str, float]]] = {
        "validation_loss": {name: losses.loss for name, losses in found.items()},
        "validation_level_loss": {name: losses.by_level for name, losses in found.items()},
    }
    bounds = {name: losses.bound_bits for name, losses in found.items() if losses.bound_bits is not None}
    return {**values, "validation_bound": bounds} if bounds else values


def _told(step: int, found: Mapping[str, Losses], seconds: float) -> str:
    figures = [
        f"{name} {losses.loss:.4f}" + (f" ({losses.bound_bits:.3f} bits/dim)" if losses.bound_bits is not None else "")
        for name, losses in found.items()
    ]
    return f"validation after step {step}: {', '.join(figures)}, in {duration(seconds)}"
