"""The random numbers of a training step, keyed by (seed, step, position): the same at any world size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import randomness
from pipeline.diffusion.objective import Objective
from pipeline.randomness import Purpose


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
