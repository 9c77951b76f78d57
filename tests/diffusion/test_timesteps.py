"""Times: their distributions, and strata that do not depend on the world size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.timesteps import log_normal, logit_normal, normal_of, row, stratified
from pipeline.randomness import Purpose, normal, uniform

LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)


def normals(count: int) -> Tensor:
    return normal(0, Purpose.TIMESTEP, 0, torch.arange(count), ())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 1.5)])
def test_logit_normal_has_the_quantiles_of_the_paper(mean: float, std: float) -> None:
    t = logit_normal(normals(200_000), mean, std).double()
    exact = torch.sigmoid(mean + std * torch.special.ndtri(LEVELS))
    assert torch.allclose(torch.quantile(t, LEVELS), exact, atol=0.005)


def test_log_normal_is_karras_distribution_of_sigma() -> None:
    sigma = log_normal(normals(200_000), -1.2, 1.2).double()
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.01)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.01)


def test_rows_are_equally_likely_and_none_is_beyond_the_last() -> None:
    assert row(torch.tensor([0.0, 0.24, 0.25, 0.999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    u = uniform(0, Purpose.TIMESTEP, 0, torch.arange(100_000), ())
    counts = torch.bincount(row(u, 10).long(), minlength=10)
    assert (counts - 10_000).abs().max() < 400


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 1024])
def test_every_global_batch_has_one_number_in_each_part(batch: int) -> None:
    for step in range(5):
        numbers = uniform(3, Purpose.TIMESTEP, step, torch.arange(batch), (2,))
        unit = stratified(numbers, torch.arange(batch))
        assert (unit * batch).floor().long().sort().values.tolist() == list(range(batch))
        assert (unit > 0).all()
        assert (unit < 1).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_world_size_does_not_change_a_positions_number(world_size: int) -> None:
    numbers = uniform(3, Purpose.TIMESTEP, 9, torch.arange(32), (2,))
    whole = stratified(numbers, torch.arange(32))
    parts = [stratified(numbers, part) for part in torch.arange(32).chunk(world_size)]
    assert torch.equal(torch.cat(parts), whole)


def test_positions_have_another_part_at_every_step() -> None:
    parts = []
    for step in range(400):
        numbers = uniform(0, Purpose.TIMESTEP, step, torch.arange(16), (2,))
        parts.append((stratified(numbers, torch.tensor([5])) * 16).floor().long())
    counts = torch.bincount(torch.cat(parts), minlength=16)
    assert counts.min() > 8  # 25 are expected
    assert counts.max() < 48


def test_the_mean_over_a_batch_is_steadier_than_of_independent_numbers() -> None:
    means, plain = [], []
    for step in range(200):
        numbers = uniform(0, Purpose.TIMESTEP, step, torch.arange(64), (2,))
        means.append(stratified(numbers, torch.arange(64)).mean())
        plain.append(numbers[:, 1].mean())
    assert torch.stack(means).std() < 0.05 * torch.stack(plain).std()


def test_normal_of_is_the_quantile_function() -> None:
    assert normal_of(torch.tensor([0.5], dtype=torch.float64)).item() == 0
    z = normal_of(torch.tensor([0.975, 2.0**-25 / 4096, 1 - 2.0**-25 / 4096], dtype=torch.float64))
    assert z[0].item() == pytest.approx(1.959964, abs=1e-6)
    assert all(math.isfinite(value) for value in z.tolist())
