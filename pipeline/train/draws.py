"""The random numbers of a training step, keyed by (seed, step, position), and of validation: of any world size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import randomness
from pipeline.diffusion.objective import Objective
from pipeline.randomness import Purpose

_GOLDEN = (math.sqrt(5) - 1) / 2
_EDGE = 2.0**-25  # quantiles are kept this far from 0 and 1, where a normal number would be infinite


class Draws(NamedTuple):
    """What an objective makes training points of."""

    noise: Tensor  # float32 [b, C, h, w]
    t: Tensor  # float32 [b]


def draw(
    objective: Objective, seed: int, step: int, positions: Tensor, *, shape: tuple[int, ...], global_batch: int
) -> Draws:
    """Noise and times of the samples at some positions.

    Args:
        objective: says which numbers it takes.
        seed: of the run.
        step: of the run.
        positions: int64 [b], places in the global batch; the numbers are on their device.
        shape: of a latent, (C, h, w).
        global_batch: samples of the step, over all ranks.
    """
    noise = randomness.normal(seed, Purpose.NOISE, step, positions, shape)
    if objective.offset_noise:
        noise = objective.with_offset(noise, randomness.normal(seed, Purpose.OFFSET_NOISE, step, positions, shape[:1]))
    if objective.numbers == "stratified":
        everywhere = torch.arange(global_batch, device=positions.device)
        numbers = randomness.uniform(seed, Purpose.TIMESTEP, step, everywhere, (2,))
    else:
        generator = randomness.uniform if objective.numbers == "uniform" else randomness.normal
        numbers = generator(seed, Purpose.TIMESTEP, step, positions, ())
    return Draws(noise, objective.times(numbers, positions))


def fixed_draw(
    objective: Objective, seed: int, part: int, parts: int, *, positions: Tensor, shape: tuple[int, ...]
) -> Draws:
    """Noise and times that are the same at every step, of one of equal parts of the distribution of times.

    Args:
        objective: says how noise and times are distributed.
        seed: of validation.
        part: 0 to parts - 1, from the data end on.
        parts: how many there are.
        positions: int64 [b], each sample's number; what it is given depends on no other sample.
        shape: of a latent, (C, h, w).
    """
    count = math.prod(shape)
    numbers = randomness.normal(seed, Purpose.VALIDATION_NOISE, part, positions, (count + shape[0],))
    noise = numbers[:, :count].reshape(-1, *shape)
    if objective.offset_noise:
        noise = objective.with_offset(noise, numbers[:, count:])
    return Draws(noise, fixed_times(objective, seed, part, parts, positions=positions))


def fixed_times(objective: Objective, seed: int, part: int, parts: int, *, positions: Tensor) -> Tensor:
    """The times of `fixed_draw`, [b].

    They follow each other by the golden section of the part, so that samples together cover it evenly: a
    low-discrepancy sequence as in Kingma et al. 2021 (https://arxiv.org/abs/2107.00630, appendix I.1), of any length.
    """
    start = randomness.uniform(seed, Purpose.VALIDATION_TIME, part, torch.zeros_like(positions[:1]), ())
    places = (start.double() + positions.double() * _GOLDEN) % 1.0
    return objective.times_at(_quantile(part + places, parts))


def edges(objective: Objective, parts: int) -> Tensor:
    """Noise levels between which the parts of `fixed_draw` lie, from the data end on: [parts + 1]."""
    return objective.noise_level(objective.times_at(_quantile(torch.arange(parts + 1).double(), parts)))


def _quantile(place: Tensor, parts: int) -> Tensor:
    return (place / parts).clamp(_EDGE, 1 - _EDGE)
