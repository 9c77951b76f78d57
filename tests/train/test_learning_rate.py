"""Learning rates against their formulas, and against the schedulers of torch, transformers and diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import diffusers.optimization
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import OptimizerConfig
from pipeline.train.learning_rate import learning_rate

SCHEDULES = get_args(OptimizerConfig.model_fields["schedule"].annotation)
PEAK, WARMUP, TOTAL = 1e-2, 4, 104
OWN = {"final_learning_rate_ratio": st.floats(0, 1)}, {"reference_steps": st.none() | st.integers(1, 10**6)}, {}
OF = {"cosine": OWN[0], "linear": OWN[0], "inverse_sqrt": OWN[1], "edm2": OWN[1], "constant": OWN[2]}
configs = st.sampled_from(SCHEDULES).flatmap(
    lambda schedule: st.builds(
        OptimizerConfig,
        learning_rate=st.floats(1e-8, 10),
        schedule=st.just(schedule),
        warmup_steps=st.integers(0, 10**4),
        **OF[schedule],
    )
)


def rates(count: int = TOTAL + 1, total: int = TOTAL, **fields: Any) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": PEAK, "warmup_steps": WARMUP, **fields})
    return [learning_rate(step, config, total) for step in range(count)]


def theirs(make: Callable[[torch.optim.Optimizer], Any], count: int) -> list[float]:
    """The rates that another library's scheduler sets, from its first step on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_default_warms_up_peaks_and_ends_at_its_ratio():
    found = rates(final_learning_rate_ratio=0.1)
    assert found[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert found[54] == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5))  # half of the cosine
    assert found[104] == pytest.approx(1e-3)


@given(step=st.integers(0, 10**7), total=st.integers(1, 10**7), config=configs)
def test_the_default_is_bit_for_bit_what_it_was_before_there_were_others(step, total, config):
    config = config.model_copy(update={"schedule": "cosine"})
    if step < config.warmup_steps:
        before = config.learning_rate * (step + 1) / config.warmup_steps
    else:
        share = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
        floor = config.final_learning_rate_ratio
        before = config.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share)))
    assert OptimizerConfig().schedule == "cosine"
    assert learning_rate(step, config, total) == before


@given(step=st.integers(0, 10**7), total=st.integers(1, 10**7), config=configs)
def test_every_rate_is_finite_and_at_most_the_peak(step, total, config):
    rate = learning_rate(step, config, total)
    assert 0 <= rate <= config.learning_rate * (1 + 1e-12)
    assert math.isfinite(rate)


@given(config=configs, total=st.integers(1, 400))
def test_rates_rise_to_the_peak_and_fall_from_it(config, total):
    config = config.model_copy(update={"warmup_steps": config.warmup_steps % 100})
    found = [learning_rate(step, config, total) for step in range(500)]
    if config.schedule == "edm2" and (config.reference_steps or 10**6) < config.warmup_steps:
        return  # ramp and fall overlap by design
    slack = 1e-12 * config.learning_rate
    assert all(first <= second + slack for first, second in pairwise(found[: config.warmup_steps]))
    assert all(first >= second - slack for first, second in pairwise(found[max(config.warmup_steps - 1, 0) :]))


@given(config=configs, step=st.integers(0, 10**5), factor=st.floats(1e-3, 1e3))
def test_rates_are_proportional_to_the_peak(config, step, factor):
    scaled = config.model_copy(update={"learning_rate": config.learning_rate * factor})
    assert learning_rate(step, scaled, 10**5) == pytest.approx(factor * learning_rate(step, config, 10**5), rel=1e-9)


@pytest.mark.parametrize("library", [transformers, diffusers.optimization])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_after_the_warm_up_as_transformers_and_diffusers_have_it(library, schedule):
    make = getattr(library, f"get_{schedule}_schedule_with_warmup")
    length = {} if schedule == "constant" else {"num_training_steps": TOTAL}
    found = theirs(lambda optimizer: make(optimizer, num_warmup_steps=WARMUP, **length), TOTAL)
    ours = rates(schedule=schedule)
    assert ours[WARMUP:TOTAL] == pytest.approx(found[WARMUP:], rel=1e-12)
    assert ours[:WARMUP] == pytest.approx(found[1 : WARMUP + 1])  # they spend a step at rate 0


@pytest.mark.parametrize("scale", [None, 20])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_inverse_square_root_as_transformers_has_it(warmup, scale):
    found = theirs(lambda o: transformers.get_inverse_sqrt_schedule(o, warmup, timescale=scale), TOTAL)
    ours = rates(schedule="inverse_sqrt", warmup_steps=warmup, reference_steps=scale)
    assert ours[warmup:TOTAL] == pytest.approx(found[warmup:], rel=1e-12)


def test_cosine_and_linear_to_a_ratio_as_torch_has_them():
    cosine = theirs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1 * PEAK), TOTAL)
    linear = theirs(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, TOTAL), TOTAL)
    for schedule, found in (("cosine", cosine), ("linear", linear)):
        ours = rates(TOTAL, schedule=schedule, warmup_steps=0, final_learning_rate_ratio=0.1)
        assert ours == pytest.approx(found, rel=1e-9)


def test_edm2_is_the_formula_of_its_paper():
    found = rates(300, schedule="edm2", warmup_steps=10, reference_steps=50)
    for step, rate in enumerate(found):
        ramp = min((step + 1) / 10, 1.0)
        assert rate == pytest.approx(PEAK * ramp / math.sqrt(max(step / 50, 1.0)), rel=1e-12)
    assert found[200] == pytest.approx(PEAK / 2)
    late = learning_rate(280_000, OptimizerConfig(learning_rate=PEAK, schedule="edm2"), 1)
    assert late == pytest.approx(PEAK / 2)  # t_ref of 70,000 steps, whatever the run's length


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant")[WARMUP:]) == {PEAK}
