"""Ranks leave a finished run together, or not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.config import TrainConfig
from pipeline.errors import LatheError
from pipeline.runtime import process
from pipeline.train import start, trainer

SAID = "finished already: run/step-00000030 has all 30 steps"


class JoinedError(Exception):
    """The ranks go on together."""


def fit(monkeypatch, *, seen: str, witness: int | None, alone: bool = False) -> list[str]:
    """What one rank does that has seen so much, where `witness` is the lowest that has seen the run's end."""
    done: list[str] = []

    def go_on(phase: str) -> None:
        raise JoinedError

    def join(engine: object) -> SimpleNamespace:
        done.append("joined")
        return SimpleNamespace(
            first=lambda flag: witness, watch=SimpleNamespace(note=go_on), finish=lambda: done.append("left")
        )

    def open_data(config: TrainConfig) -> tuple[TrainConfig, SimpleNamespace]:
        done.append("opened data")
        return config, SimpleNamespace()

    monkeypatch.setenv("WORLD_SIZE", "1" if alone else "2")
    monkeypatch.setattr(process, "start", join)
    monkeypatch.setattr(start, "conclusion_seen", lambda store, config: seen)
    monkeypatch.setattr(start, "open_data", open_data)
    monkeypatch.setattr(trainer, "say", done.append)
    trainer.fit(TrainConfig(manifest="m", output="run"))
    return done


@pytest.mark.parametrize("seen", [SAID, ""])
def test_by_the_word_of_rank_0_a_finished_run_is_left(monkeypatch, seen):
    first = [] if seen else ["opened data"]
    assert fit(monkeypatch, seen=seen, witness=0) == [*first, "joined", seen, "left"]


def test_one_that_is_not_finished_goes_on(monkeypatch):
    with pytest.raises(JoinedError):
        fit(monkeypatch, seen="", witness=None)


@pytest.mark.parametrize("seen", [SAID, ""])
def test_a_rank_that_sees_more_than_rank_0_ends_all(monkeypatch, seen):
    with pytest.raises(LatheError, match=r"^rank 1 sees a checkpoint of the last step in run, and rank 0 does not\n"):
        fit(monkeypatch, seen=seen, witness=1)


def test_alone_nobody_is_asked(monkeypatch):
    assert fit(monkeypatch, seen=SAID, witness=None, alone=True) == [SAID]
