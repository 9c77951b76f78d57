"""What is summed up between two lines of the log: losses by noise level, where the time goes, who is slow."""

from __future__ import annotations

import math
import statistics
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import TrainConfig
from pipeline.diffusion.objective import objective_of
from pipeline.train import noise_levels
from pipeline.train.draws import fixed_times
from pipeline.train.interval import Interval, RankTimes
from pipeline.train.noise_levels import LevelLosses, NoiseLevels
from pipeline.train.speed import memory, speed, straggler
from pipeline.train.step_clock import StepClock
from pipeline.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def _a_clock_that_sleep_alone_moves(monkeypatch):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def config(**changes) -> TrainConfig:
    return TrainConfig.model_validate({"manifest": "m", "output": "o", "global_batch": 8, **changes})


@pytest.mark.parametrize("objective", [{}, {"kind": "ddpm"}, {"kind": "edm"}])
def test_the_parts_are_those_of_validation(objective):
    settings = config(objective=objective)
    levels, about = NoiseLevels(settings), objective_of(settings.objective)
    parts = settings.validation.noise_levels
    for part in range(parts):
        drawn = about.noise_level(fixed_times(about, 0, part, parts, positions=torch.arange(500)))
        share = (levels.part_of(drawn) == part).double().mean()
        assert share > 0.95, (part, share)  # discrete times at an edge are in one of both


def test_errors_are_summed_by_level_and_folded_without_being_lost(monkeypatch):
    monkeypatch.setattr(noise_levels, "_MOST_HELD", 3)
    levels = NoiseLevels(config())
    count = len(levels.names)
    generator = torch.Generator().manual_seed(1)
    losses, expected = LevelLosses(levels, CPU), torch.zeros(2, count, dtype=torch.float64)
    for _ in range(10):
        errors = torch.rand(6, generator=generator, requires_grad=True)
        noise = torch.rand(6, generator=generator)
        weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 1.0])  # the last but one is of a damaged block
        shown = errors.detach().clone()
        shown[5] = math.nan
        losses.add(shown, noise, weight)
        for part, error in zip(levels.part_of(noise[:4]).tolist(), errors[:4].tolist(), strict=True):
            expected[:, part] += torch.tensor([error, 1.0], dtype=torch.float64)
    torch.testing.assert_close(losses.sums(), expected)
    torch.testing.assert_close(losses.sums(), expected)


class Event:
    """A CUDA event on a stream whose time this test sets."""

    now = 0.0
    waited: ClassVar[list[float]] = []

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        Event.waited.append(self.at)

    def elapsed_time(self, end_event: Event) -> float:
        return (end_event.at - self.at) * 1e3


@pytest.mark.parametrize("steps", [3, 3000])
def test_a_gpus_parts_are_read_off_its_events_and_only_when_told(steps, monkeypatch):
    monkeypatch.setattr(Event, "waited", [])
    clock = StepClock(torch.device("cuda"), Event)
    for _ in range(steps):
        Event.now += 100  # of other things
        clock.start()
        for _ in range(2):
            Event.now += 2
            clock.mark("forward")
            Event.now += 3
            clock.mark("backward")
        Event.now += 1
        clock.mark("optimizer")
        assert steps > 3 or Event.waited == []
    assert all(at < Event.now - 1000 for at in Event.waited)  # long done
    told = clock.seconds()
    assert told == pytest.approx({"forward": 4 * steps, "backward": 6 * steps, "optimizer": steps})
    assert Event.waited[-1] == Event.now
    assert clock.seconds() == told


@pytest.mark.usefixtures("_a_clock_that_sleep_alone_moves")
def test_a_hosts_parts():
    clock = StepClock(CPU)
    for _ in range(2):
        time.sleep(0.03)
        clock.start()
        time.sleep(0.01)
        clock.mark("forward")
        time.sleep(0.02)
        clock.mark("optimizer")
    assert clock.seconds() == pytest.approx({"forward": 0.02, "backward": 0, "optimizer": 0.04})


def ranks(number: int, others: list[torch.Tensor]):
    """A rank whose reduction adds what the others gave."""
    return SimpleNamespace(
        rank=number, world_size=len(others) + 1, sum=lambda values: sum(others, start=values.double())
    )


def packed(world: int, rank: int, count: int, times: RankTimes) -> torch.Tensor:
    rows = torch.zeros(world, 3, dtype=torch.float64)
    rows[rank] = torch.tensor(times)
    losses = torch.tensor([6.0, 2.0], dtype=torch.float64)
    return torch.cat([losses, torch.ones(2 * count, dtype=torch.float64), rows.flatten()])


@pytest.mark.usefixtures("_a_clock_that_sleep_alone_moves")
def test_one_reduction_brings_losses_levels_and_every_ranks_times():
    levels = NoiseLevels(config())
    count = len(levels.names)
    other = RankTimes(0.5, 1.0, 3.0)
    interval = Interval(CPU, levels, logging_seconds=0.4)
    for loss in (1.0, math.nan):
        interval.begin()
        interval.hear(torch.tensor([5.0]), torch.tensor([0.0]), torch.ones(1))
        interval.mark("forward")
        interval.mark("backward")
        with interval.waiting_for_ranks():
            time.sleep(0.005)
        interval.add(torch.tensor(loss), 0.25, 0.05, 1.0)
    totals = interval.reduced(ranks(1, [packed(2, 0, count, other)]), interval.parts())
    assert totals.loss == (6 + 1) / 3
    assert list(totals.level_losses) == levels.names
    assert totals.level_losses[levels.names[0]] == (5 + 5 + 1) / 3
    assert totals.ranks[0] == other
    assert totals.ranks[1].wait == 0.25
    told = speed(config(), interval, interval.parts(), totals.ranks)
    assert told["step_seconds"] == pytest.approx(1.2)
    assert told["logging_seconds"] == pytest.approx(0.2)
    assert told["ranks_wait_seconds"] == pytest.approx(0.055)
    assert told["images_per_second"] == pytest.approx(16 / 2.4)
    assert told["images_per_second_per_device"] == pytest.approx(8 / 2.4)
    assert told["slowest_rank"] == 0


class Engine(torch.nn.Identity):
    accumulation = 1

    def forward(self, noisy):
        time.sleep(0.01)
        return noisy

    def backward(self, _loss) -> None:
        """Nothing."""

    def step(self, _rate) -> None:
        """Nothing."""


@pytest.mark.usefixtures("_a_clock_that_sleep_alone_moves")
def test_neither_waiting_for_ranks_nor_what_is_noted_of_a_step_is_one_of_its_parts():
    one = torch.ones(1, 1)
    chunk = SimpleNamespace(inputs=(one,), target=one, weight=torch.ones(1), noise_level=torch.zeros(1))

    def slow(*_):
        time.sleep(0.03)

    trainer = SimpleNamespace(
        interval=Interval(CPU, NoiseLevels(config())),
        ranks=SimpleNamespace(watch=SimpleNamespace(note=lambda *_: None)),
        progress=SimpleNamespace(step=0),
        reporter=SimpleNamespace(begin=slow, end=slow),
        examples=SimpleNamespace(of=lambda *_: SimpleNamespace(chunks=lambda _: [chunk])),
        engine=Engine(),
        suspects=SimpleNamespace(remember=lambda *_: None),
        config=config(),
        _share=slow,
    )
    trainer.interval.add(Trainer.train_step(trainer, None), 0.0, 0.0, 1.0)
    assert trainer.interval.parts() == pytest.approx({"forward": 0.01, "backward": 0, "optimizer": 0})
    assert trainer.interval.ranks_wait_seconds == pytest.approx(0.03)


def test_without_levels_nothing_more_than_loss_and_time_is_told():
    interval = Interval(CPU, None)
    interval.begin()
    interval.hear(torch.ones(1), torch.ones(1), torch.ones(1))
    interval.mark("optimizer")
    interval.add(torch.tensor(2.0), 0.0, 0.0, 1.0)
    totals = interval.reduced(ranks(0, []), interval.parts())
    assert (totals.loss, totals.level_losses, interval.parts()) == (2.0, {}, {})
    assert "straggler_ratio" not in speed(config(), interval, {}, totals.ranks)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=9))
def test_the_slowest_rank_over_the_median_one(own):
    told = straggler([RankTimes(0.0, seconds, 200.0) for seconds in own])
    assert own[int(told["slowest_rank"])] == max(own)
    assert told["straggler_ratio"] == pytest.approx(max(own) / statistics.median(own))


def test_ranks_that_do_nothing_are_no_stragglers():
    assert straggler([RankTimes(0, 0, 0)] * 2) == {"straggler_ratio": 1.0, "slowest_rank": 0}


def test_memory_of_a_host():
    told = memory(CPU)
    assert told.keys() == {"resident_memory_bytes", "host_memory_available_bytes"}
    assert min(told.values()) > 2**20
