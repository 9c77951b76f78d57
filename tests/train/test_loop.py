"""The training loop by itself: no ranks, no engine, no data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import TrainConfig
from pipeline.errors import DataError
from pipeline.runtime.engine import Outcome
from pipeline.train.progress import Progress
from pipeline.train.trainer import Trainer

DEVICE_SECONDS = 0.05


class Feed:
    """So many batches."""

    failed, stopped_by, waited_seconds, ranks_wait_seconds, told = False, 0, 0.0, 0.0, ()

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def is_over(self) -> bool:
        return self._left < 0

    def next(self) -> object | None:
        self._left -= 1
        return object() if self._left >= 0 else None


def bare(**changes: Any) -> Trainer:
    """A trainer whose device is slower than its host, which waits for it where it asks for outcomes."""
    trainer = Trainer.__new__(Trainer)
    trainer.config = TrainConfig.model_validate({"manifest": "m", "output": "o", "steps": 6, **changes})
    trainer.progress = Progress((), ())
    trainer.validator, trainer.owes_checkpoint, trainer.levels = None, False, None
    queued: list[int] = []

    def train_step(batch: object) -> torch.Tensor:
        trainer.progress.step += 1
        queued.append(1)
        return torch.zeros(())

    def outcomes(*, wait: bool) -> list[Any]:
        if wait:
            time.sleep(DEVICE_SECONDS * len(queued))
            queued.clear()
        return []

    @contextmanager
    def finished_first() -> Iterator[None]:
        try:
            yield
        except DataError:
            trainer.saves.finished = True
            raise

    fakes = {
        "train_step": train_step,
        "engine": SimpleNamespace(outcomes=outcomes),
        "suspects": SimpleNamespace(look=lambda told: None),
        "metrics": SimpleNamespace(set=lambda *_: None),
        "loader": SimpleNamespace(skipped=[]),
        "ranks": SimpleNamespace(device=torch.device("cpu"), world_size=1, sum=lambda values: values),
        "datasets": SimpleNamespace(samples=100),
        "saves": SimpleNamespace(hear=lambda *_, **__: None, save=lambda *_, **__: None, finished_first=finished_first),
    }
    for name, fake in fakes.items():
        setattr(trainer, name, fake)
    return trainer


@pytest.mark.parametrize("log_every", [1, 3])
def test_seconds_of_an_interval_are_those_of_the_device(log_every):
    trainer, told = bare(log_every=log_every), []

    def report(progress: Progress, interval: Any, loader: Any) -> tuple[dict[str, str], float]:
        told.append(interval.seconds / interval.steps)
        return {}, 0.0

    trainer.reporter = SimpleNamespace(report=report)
    for _ in trainer._train(Feed(6), SimpleNamespace(move=lambda *_: None, row=lambda *_, **__: None)):
        pass
    assert len(told) == 6 // log_every
    assert min(told) >= DEVICE_SECONDS


def test_too_many_skipped_samples_let_a_save_on_its_way_be_finished():
    trainer = bare(loader={"on_damage": "skip", "max_skip_rate": 0.0})
    with pytest.raises(DataError, match="could not be read, more than"):
        trainer._share(SimpleNamespace(weight=torch.zeros(64)))
    assert trainer.saves.finished


def test_a_checkpoint_that_was_due_as_steps_were_skipped_is_made_after_the_next_that_was_not():
    trainer, order = bare(checkpoint={"every": 2}), []
    skipped = {1, 2, 3}  # steps, counted from 1

    def outcomes(*, wait: bool) -> list[Any]:
        return [Outcome.NOT_FINITE if trainer.progress.step in skipped else Outcome.APPLIED]

    trainer.engine = SimpleNamespace(outcomes=outcomes)
    trainer.saves.save = lambda progress, blocks, last: order.append(f"saved {progress.step}" + ", the last" * last)
    trainer.ranks.watch = SimpleNamespace(note=lambda phase: None)
    trainer.saves.hear = lambda told, only_lease: (
        order.append("leaves the rest to the last save") if only_lease else None
    )
    trainer.validator = SimpleNamespace(due=lambda step: step == 4, run=lambda step: order.append(f"validated {step}"))
    trainer.reporter = SimpleNamespace(report=lambda *_: ({}, 0.0))
    for _ in trainer._train(Feed(6), SimpleNamespace(move=lambda *_: None, row=lambda *_, **__: None)):
        pass
    assert order[:2] == ["saved 4", "validated 4"]  # not after step 2; and before validation, which may fail
    assert order[2:] == ["leaves the rest to the last save", "saved 6, the last"]
