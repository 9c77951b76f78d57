"""Moving averages of the weights as pure functions: decays by the step, profiles, and post-hoc reconstruction.

Power function averages and their reconstruction are those of Karras et al. 2024 (https://arxiv.org/abs/2312.02696,
section 3 and appendix C). An average of relative length sigma_rel weighs the weights of step s, at step t, by
p(s) = (gamma + 1) s^gamma / t^(gamma + 1) (eq. 121). Steps are updates of the weights, counted from 1.

Legend: n stored averages, each of a step and a length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AverageConfig

Floats = NDArray[np.float64]

_SMALLEST = 1e-9  # a coefficient below it moves the result by less than float32 tells
_RANK_TOLERANCE = 1e-13  # relative singular value below which stored averages count as the same


def decay_at(average: AverageConfig, step: int) -> float:
    """Decay of an average at one update: avg = decay avg + (1 - decay) weights."""
    if average.sigma_rel is not None:
        return power_decay(step, average.sigma_rel)
    return constant_decay(step, average.decay or 0.0)


def constant_decay(step: int, decay: float) -> float:
    """Decay at one update: min(decay, (1 + step) / (10 + step)).

    The warm-up of TensorFlow's ExponentialMovingAverage, by which short runs forget their start: until `decay` is
    reached, about a power function average with gamma = 8.
    """
    return min(decay, (1.0 + step) / (10.0 + step))


def power_decay(step: int, sigma_rel: float) -> float:
    """Decay at one update of the average of relative length `sigma_rel`, eq. 127: (1 - 1 / t)^(gamma + 1).

    It is 0 at the first update: the average has no trace of the random start.
    """
    return float((1.0 - 1.0 / step) ** (gamma_of(sigma_rel) + 1.0))


@lru_cache(maxsize=256)
def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile whose standard deviation is `sigma_rel` of the training so far: eq. 123 solved for it.

    Args:
        sigma_rel: above 0, at most 12^-0.5 = 0.2887, where gamma = 0 and all steps weigh the same.
    """
    one, two, three = (np.poly1d([1.0, number]) for number in (1.0, 2.0, 3.0))
    cubic = two * two * three - one * sigma_rel**-2.0
    return float(cubic.roots.real.max())  # the largest root: profiles rise


def sigma_rel_of(gamma: float) -> float:
    """Relative standard deviation of a power function profile, eq. 123."""
    return float(((gamma + 1.0) / (gamma + 3.0)) ** 0.5 / (gamma + 2.0))


class Fit(NamedTuple):
    """How stored averages make another one."""

    coefficients: Floats  # [n], of sum 1; 0 where a stored average is not needed
    error: float  # L2 norm of what the profile is off, relative to the profile's


def fit(steps: Floats, sigmas: Floats, step: float, sigma_rel: float) -> Fit:
    """The combination of stored averages whose profile is nearest to a wanted one: least squares, algorithm 3.

    Args:
        steps: [n] at which the averages were stored.
        sigmas: [n] their relative lengths.
        step: of the wanted average.
        sigma_rel: its relative length.
    """
    gammas = np.array([gamma_of(sigma) for sigma in sigmas.tolist()])
    wanted = gamma_of(sigma_rel)
    products = inner_product(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    aims = inner_product(steps, gammas, step, wanted)
    solved = np.linalg.lstsq(products, aims, rcond=_RANK_TOLERANCE)[0]
    solved[np.abs(solved) < _SMALLEST] = 0.0
    found = solved / solved.sum()
    norm = float(inner_product(step, wanted, step, wanted))
    squared = 1.0 + float(found @ products @ found - 2.0 * found @ aims) / norm
    return Fit(found, max(squared, 0.0) ** 0.5)


def inner_product(step_a: Any, gamma_a: Any, step_b: Any, gamma_b: Any) -> Floats:
    """Integral over time of the product of two profiles, eq. 151; arguments are broadcast."""
    earlier, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    exponent = np.where(np.less(step_a, step_b), gamma_b, gamma_a)  # of the profile that goes on
    scale = (np.add(gamma_a, 1.0) * np.add(gamma_b, 1.0)) / (np.add(gamma_a, gamma_b) + 1.0)
    product: Floats = scale * (earlier / later) ** exponent / later
    return product
