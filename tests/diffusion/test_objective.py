"""Objectives from the run file: times, points, and the default's numbers as they have always been."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.diffusion.path import RectifiedFlow
from pipeline.randomness import Purpose, normal

KINDS = [
    {},
    {"prediction": "x0", "timesteps": "uniform", "weighting": "p2"},
    {"kind": "ddpm"},
    {"kind": "ddpm", "prediction": "v", "schedule": "cosine", "weighting": "soft_min_snr"},
    {"kind": "ddpm", "prediction": "x0", "timesteps": "logit_normal", "weighting": "p2"},
    {"kind": "ddpm", "prediction": "v", "schedule": "linear", "zero_terminal_snr": True},
    {"kind": "edm"},
    {"kind": "edm", "weighting": "min_snr"},
]


def made(**fields: object) -> Objective:
    return objective_of(ObjectiveConfig(**fields))


def latents(count: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(count)
    return normal(0, Purpose.POSTERIOR, 0, places, (4, 2, 2)), normal(0, Purpose.NOISE, 0, places, (4, 2, 2))


def numbers_for(objective: Objective, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if objective.numbers == "stratified":
        return torch.rand(count, 2, generator=generator)
    if objective.numbers == "uniform":
        return torch.rand(count, generator=generator)
    return torch.randn(count, generator=generator)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_every_point_is_finite_and_its_target_means_its_data(fields: dict, stratified: bool) -> None:
    objective = made(**fields, stratified=stratified)
    count = 4096
    x0, noise = latents(count)
    t = objective.times(numbers_for(objective, count), torch.arange(count))
    assert t.dtype == torch.float32
    point = objective.at(x0, noise, t)
    for part in point:
        assert part.dtype == torch.float32
        assert torch.isfinite(part).all()
    assert (point.weight >= 0).all()
    assert ((point.noise_level >= 0) & (point.noise_level <= 1)).all()
    scale = (point.input[0, 0, 0, 0] / (objective.path.alpha(t) * x0[:, 0, 0, 0])[0]).item()
    assert scale != 0
    alpha, sigma = (f(t)[:, None, None, None] for f in (objective.path.alpha, objective.path.sigma))
    found = objective.denoiser(lambda given, embedding: point.target)(alpha * x0 + sigma * noise, t)
    trusted = point.noise_level < 0.98  # epsilon's rounding grows beyond
    torch.testing.assert_close(found[trusted], x0[trusted], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_denoiser_gives_the_network_what_training_gave_it(fields: dict) -> None:
    objective = made(**fields)
    x0, noise = latents(64)
    t = objective.times(numbers_for(objective, 64), torch.arange(64))
    point = objective.at(x0, noise, t)
    alpha, sigma = (f(t)[:, None, None, None] for f in (objective.path.alpha, objective.path.sigma))

    def network(given: Tensor, embedding: Tensor) -> Tensor:
        assert torch.equal(given, point.input)
        assert torch.equal(embedding, point.embedding)
        return point.target

    objective.denoiser(network)(alpha * x0 + sigma * noise, t)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_what_a_network_in_low_precision_says_is_gone_on_with_in_float32(fields: dict) -> None:
    objective = made(**fields)
    noisy, t = latents(4)[0], objective.times_at(torch.full((4,), 0.5))
    assert objective.denoiser(lambda x, _: x.bfloat16())(noisy, t).dtype == torch.float32


def test_the_default_is_bit_for_bit_what_it_was() -> None:
    """Rectified flow before there were others: the formulas as written then."""
    objective = made(timestep_mean=0.4)
    x0, noise = latents(512)
    numbers = normal(0, Purpose.TIMESTEP, 0, torch.arange(512), ())
    t = objective.times(numbers, torch.arange(512))
    assert torch.equal(t, torch.sigmoid(0.4 + 1.0 * numbers))
    point, wide = objective.at(x0, noise, t), t.reshape(-1, 1, 1, 1)
    assert torch.equal(point.input, (1 - wide) * x0 + wide * noise)
    assert torch.equal(point.embedding, 1000.0 * t)
    assert torch.equal(point.target, noise - x0)
    assert torch.equal(point.weight, torch.ones(512))


def test_ddpm_is_trained_at_whole_rows_only() -> None:
    for timesteps in ("uniform", "logit_normal"):
        objective = made(kind="ddpm", timesteps=timesteps)
        t = objective.times(numbers_for(objective, 50_000), torch.arange(50_000))
        assert torch.equal(t, t.round())
        assert (t.min(), t.max()) == ((0, 999) if timesteps == "uniform" else (t.min(), t.max()))
        assert 0 <= t.min() < t.max() <= 999


def test_edms_noise_is_log_normal_around_p_mean() -> None:
    for stratified in (False, True):
        objective = made(kind="edm", timestep_mean=-1.2, timestep_std=1.2, stratified=stratified)
        t = objective.times(numbers_for(objective, 50_000), torch.arange(50_000)).log()
        assert t.mean().item() == pytest.approx(-1.2, abs=0.02)
        assert t.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_strata_have_the_distribution_of_independent_times(fields: dict) -> None:
    plain, even = made(**fields), made(**fields, stratified=True)
    count, levels = 50_000, torch.linspace(0.05, 0.95, 10)
    places = torch.arange(count)
    quantiles = [torch.quantile(o.times(numbers_for(o, count), places), levels) for o in (plain, even)]
    torch.testing.assert_close(quantiles[0], quantiles[1], rtol=0.06, atol=0.01)


def test_offset_noise_spreads_the_means_of_channels_alone() -> None:
    objective = made(kind="ddpm", offset_noise=0.1)
    noise, offset = torch.randn(20_000, 2, 4, 4), torch.randn(20_000, 2)
    shifted = objective.with_offset(noise, offset)
    assert shifted.mean((2, 3)).var().item() == pytest.approx(1 / 16 + 0.01, rel=0.05)
    inner = (shifted - shifted.mean((2, 3), keepdim=True)) - (noise - noise.mean((2, 3), keepdim=True))
    assert inner.abs().max() < 1e-5


def test_epsilon_on_the_cosine_schedule_is_sampled_from_where_it_means_something() -> None:
    assert made(kind="ddpm", schedule="cosine").path.t_max < 999
    assert made(kind="ddpm", schedule="cosine", prediction="v").path.t_max == 999
    assert isinstance(made().path, RectifiedFlow)
