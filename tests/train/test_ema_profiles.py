"""Profiles against sums over all steps; reconstruction against averages that were really taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import SIGMA_REL, AverageConfig
from pipeline.train.ema_profiles import (
    constant_decay,
    decay_at,
    fit,
    gamma_of,
    inner_product,
    power_decay,
    sigma_rel_of,
)

lengths = st.floats(*SIGMA_REL)


def averages(trajectory: np.ndarray, sigma_rel: float) -> np.ndarray:
    """By brute force, step by step: the average after each of the steps [T, D]."""
    found, mean = [], np.zeros(trajectory.shape[1])
    for step, weights in enumerate(trajectory, start=1):
        mean = mean + (1.0 - power_decay(step, sigma_rel)) * (weights - mean)
        found.append(mean)
    return np.array(found)


def wander(steps: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Weights as training moves them [steps, size]: a way from 0 to about 1, slower and slower, with noise."""
    rng = np.random.default_rng(seed)
    way = 1.0 - np.exp(-4.0 * np.arange(1, steps + 1) / steps)[:, None]
    drift = np.cumsum(rng.standard_normal((steps, size)), 0) * 0.3 / math.sqrt(steps)
    return way * rng.uniform(0.5, 1.5, size) + drift + 0.05 * rng.standard_normal((steps, size))


def test_a_constant_decay_lets_go_of_the_start():
    assert [constant_decay(step, 0.999) for step in (1, 90)] == pytest.approx([2 / 11, 0.91])
    assert constant_decay(10**6, 0.999) == 0.999
    assert constant_decay(5, 0.0) == 0.0


def test_decay_by_the_kind_of_average():
    assert decay_at(AverageConfig(decay=0.5), 100) == 0.5
    assert decay_at(AverageConfig(sigma_rel=0.1), 100) == power_decay(100, 0.1)
    assert decay_at(AverageConfig(decay=0.0), 100) == 0.0


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83)])
def test_exponents_of_usual_lengths(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.01)  # 6.94 and 16.97 are the paper's, section 3.1


@given(sigma_rel=lengths)
def test_length_and_exponent_are_inverse(sigma_rel):
    assert gamma_of(sigma_rel) > -0.01
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


@given(sigma_rel=lengths, step=st.integers(1, 10**7))
def test_decays_are_shares_and_rise(sigma_rel, step):
    assert 0.0 <= power_decay(step, sigma_rel) < power_decay(step + 1, sigma_rel) < 1.0
    assert power_decay(1, sigma_rel) == 0.0


@settings(deadline=None, max_examples=30)
@given(sigma_rel=st.floats(0.03, 0.28))
def test_the_weight_of_each_step_is_the_profile(sigma_rel):
    """Of the average after T steps, the weight of step s is the integral of p over (s - 1, s]."""
    steps, exponent = 2000, gamma_of(sigma_rel) + 1.0
    found = averages(np.eye(steps), sigma_rel)[-1]
    edges = (np.arange(steps + 1) / steps) ** exponent
    assert found == pytest.approx(np.diff(edges), abs=1e-12)
    mean = (found * np.arange(1, steps + 1)).sum()
    spread = math.sqrt((found * (np.arange(1, steps + 1) - mean) ** 2).sum())
    assert spread / steps == pytest.approx(sigma_rel, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(
    first=st.tuples(st.integers(200, 4000), st.floats(0.03, 0.28)),
    second=st.tuples(st.integers(200, 4000), st.floats(0.03, 0.28)),
)
def test_inner_products_are_integrals(first, second):
    steps = np.arange(4000) + 0.5

    def profile(step: int, sigma: float) -> np.ndarray:
        gamma = gamma_of(sigma)
        return np.where(steps <= step, (gamma + 1.0) * (np.minimum(steps, step) / step) ** gamma / step, 0.0)

    found = inner_product(first[0], gamma_of(first[1]), second[0], gamma_of(second[1]))
    assert float(found) == pytest.approx(float(profile(*first) @ profile(*second)), rel=2e-2)
    assert float(found) == pytest.approx(
        float(inner_product(second[0], gamma_of(second[1]), first[0], gamma_of(first[1])))
    )


# what was seen at step 5000: weights off by 6e-5, profiles by 5e-3 at 0.03; 2e-6, 4e-4 at 0.07; 2e-4, 3e-3 at 0.2
@pytest.mark.parametrize(
    ("sigma_rel", "weight_error", "profile_error"),
    [
        (0.03, 2e-4, 1e-2),
        (0.05, 1e-12, 1e-7),
        (0.07, 1e-5, 1e-3),
        (0.1, 1e-12, 1e-7),
        (0.15, 5e-5, 2e-3),
        (0.2, 5e-4, 5e-3),
    ],
)
@pytest.mark.parametrize("at", [5000, 3700])
def test_reconstruction_is_the_average_that_was_never_taken(sigma_rel, weight_error, profile_error, at):
    """A snapshot of two lengths every 100 steps of 5,000; weights of about 1."""
    trajectory = wander(5000)
    taken = {sigma: averages(trajectory, sigma) for sigma in (0.05, 0.1)}
    places = [(step, sigma) for step in range(100, at + 1, 100) for sigma in taken]
    found = fit(np.array([p[0] for p in places], float), np.array([p[1] for p in places]), at, sigma_rel)
    made = found.coefficients @ np.array([taken[sigma][step - 1] for step, sigma in places])
    assert found.coefficients.sum() == pytest.approx(1.0)
    assert np.abs(made - averages(trajectory, sigma_rel)[at - 1]).max() < weight_error
    assert found.error < profile_error


def test_an_average_that_was_stored_is_itself_alone():
    steps = np.repeat(np.arange(1, 101) * 10.0, 2)
    sigmas = np.tile([0.05, 0.1], 100)
    found = fit(steps, sigmas, 1000.0, 0.1)
    assert np.flatnonzero(found.coefficients).tolist() == [199]
    assert found.error < 1e-6


def test_lengths_that_the_snapshots_are_too_far_apart_for_are_told_by_the_error():
    steps, sigmas = np.repeat(np.arange(1, 11) * 100.0, 2), np.tile([0.05, 0.1], 10)
    errors = [fit(steps, sigmas, 1000.0, sigma).error for sigma in (0.01, 0.02, 0.04)]
    assert errors[0] > errors[1] > 0.05 > errors[2]


def test_the_same_average_twice_does_no_harm():
    once = fit(np.array([50.0, 100.0]), np.array([0.1, 0.1]), 100.0, 0.12)
    twice = fit(np.array([50.0, 100.0, 100.0]), np.array([0.1, 0.1, 0.1]), 100.0, 0.12)
    assert twice.error == pytest.approx(once.error, rel=1e-6)
    assert np.abs(twice.coefficients).max() < 2


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 60), sigma_rel=lengths, last=st.integers(60, 10**6))
def test_any_fit_is_finite_and_of_sum_one(count, sigma_rel, last):
    steps = np.repeat(np.linspace(last / count, last, count), 2)
    found = fit(steps, np.tile([0.05, 0.1], count), float(last), sigma_rel)
    assert np.isfinite(found.coefficients).all()
    assert found.coefficients.sum() == pytest.approx(1.0, abs=1e-9)
    assert found.error >= 0.0
