from __future__ import annotations

import math
import random

from pipeline.train.spikes import Spikes


def test_a_spike_is_told_with_what_is_usual_and_noise_is_not() -> None:
    draw, spikes = random.Random(0), Spikes()
    noise = [draw.gauss(1.0, 0.1) for _ in range(2000)]
    assert sum(spikes.judge(value) is not None for value in noise) == 0
    usual = spikes.judge(3.0)
    assert usual is not None
    assert 0.9 < usual < 1.1
    assert spikes.judge(1.1) is None


def test_heavy_tails_of_a_gradient_norm_are_seldom_spikes() -> None:
    draw, spikes = random.Random(0), Spikes()
    assert sum(spikes.judge(draw.lognormvariate(0, 0.5)) is not None for _ in range(2000)) < 10


def test_the_first_values_say_nothing_and_a_falling_loss_neither() -> None:
    spikes = Spikes()
    assert [spikes.judge(value) for value in (1.0, 100.0, 1.0)] == [None] * 3
    assert all(spikes.judge(10 / step) is None for step in range(1, 1000))


def test_a_still_value_may_move_a_little() -> None:
    spikes = Spikes()
    for _ in range(50):
        spikes.judge(1.0)
    assert spikes.judge(1.1) is None
    assert spikes.judge(1.5) == 1.0


def test_a_new_level_becomes_usual_and_broken_values_are_passed_over() -> None:
    spikes = Spikes()
    for _ in range(100):
        spikes.judge(1.0)
    assert spikes.judge(math.inf) is None
    assert spikes.judge(math.nan) is None
    told = [spikes.judge(5.0) for _ in range(100)]
    assert told[0] == 1.0
    assert told[-1] is None
