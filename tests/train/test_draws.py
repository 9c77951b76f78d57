"""A step's numbers: the same at any world size, and those of every run before there were other objectives."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import objective_of
from pipeline.randomness import Purpose, normal
from pipeline.train.draws import draw, edges, fixed_draw

SHAPE, BATCH = (4, 2, 2), 16


@pytest.mark.parametrize("world_size", [2, 4, 16])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("fields", [{}, {"kind": "ddpm", "offset_noise": 0.1}, {"kind": "edm"}], ids=str)
def test_the_world_size_does_not_change_a_draw(fields: dict, stratified: bool, world_size: int) -> None:
    objective = objective_of(ObjectiveConfig(**fields, stratified=stratified))
    places = torch.arange(BATCH)
    whole = draw(objective, 7, 3, places, shape=SHAPE, global_batch=BATCH)
    parts = [draw(objective, 7, 3, part, shape=SHAPE, global_batch=BATCH) for part in places.chunk(world_size)]
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    later = draw(objective, 7, 4, places, shape=SHAPE, global_batch=BATCH)
    assert not torch.equal(whole.t, later.t)
    assert not torch.equal(whole.noise, later.noise)


def test_the_defaults_numbers_are_what_they_were() -> None:
    places = torch.arange(BATCH)
    noise, t = draw(objective_of(ObjectiveConfig()), 5, 11, places, shape=SHAPE, global_batch=BATCH)
    assert torch.equal(noise, normal(5, Purpose.NOISE, 11, places, SHAPE))
    assert torch.equal(t, torch.sigmoid(normal(5, Purpose.TIMESTEP, 11, places, ())))
    assert t[:3].tolist() == pytest.approx([0.7260569, 0.2551203, 0.6140074], abs=1e-6)


def test_offset_noise_has_numbers_of_its_own() -> None:
    places = torch.arange(BATCH)
    plain, offset = (
        draw(objective_of(ObjectiveConfig(kind="ddpm", offset_noise=scale)), 5, 0, places, shape=SHAPE, global_batch=16)
        for scale in (0.0, 0.5)
    )
    shift = offset.noise - plain.noise
    assert torch.equal(offset.t, plain.t)
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift))
    assert 0.2 < shift.std() < 0.8


@pytest.mark.parametrize("fields", [{}, {"kind": "ddpm", "offset_noise": 0.1}, {"kind": "edm"}], ids=str)
def test_what_validation_is_given_depends_on_sample_and_part_alone(fields: dict) -> None:
    objective = objective_of(ObjectiveConfig(**fields))
    places = torch.arange(200)
    levels = edges(objective, 4)
    assert (levels.diff() > 0).all()
    for part in range(4):
        whole = fixed_draw(objective, 3, part, 4, positions=places, shape=SHAPE)
        some = fixed_draw(objective, 3, part, 4, positions=places[[7, 120]], shape=SHAPE)
        assert torch.equal(some.noise, whole.noise[[7, 120]])
        assert torch.equal(some.t, whole.t[[7, 120]])
        found = objective.noise_level(whole.t)
        assert levels[part] <= found.min()
        assert found.max() <= levels[part + 1]
        assert found.max() - found.min() > 0.6 * (levels[part + 1] - levels[part])
        assert whole.noise.std().item() == pytest.approx(1, abs=0.05)


def test_validation_meets_the_rows_of_a_table_alike() -> None:
    objective = objective_of(ObjectiveConfig(kind="ddpm"))
    times = [fixed_draw(objective, 0, p, 8, positions=torch.arange(1000), shape=(1, 1, 1)).t for p in range(8)]
    counts = torch.bincount(torch.cat(times).long(), minlength=1000)
    assert counts.min() >= 5
    assert counts.max() <= 11
