"""The exported schedulers, on data whose best guess is known: each must carry noise to the data's distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.diffusion.path import RectifiedFlow, VariancePreserving
from pipeline.diffusion.prediction import input_scale, target
from pipeline.export.scheduler import scheduler_of
from pipeline.randomness import Purpose, normal

MEAN, STD = 0.6, 0.8

OBJECTIVES = [
    {},
    {"prediction": "x0"},
    {"kind": "ddpm"},
    {"kind": "ddpm", "schedule": "linear", "prediction": "x0"},
    {"kind": "ddpm", "schedule": "cosine"},
    {"kind": "ddpm", "schedule": "cosine", "prediction": "v"},
    {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True},
    {"kind": "ddpm", "schedule": "linear", "prediction": "x0", "zero_terminal_snr": True},
    {"kind": "edm"},
]


def best_output(objective: Objective, given: Tensor, embedding: Tensor) -> Tensor:
    """What a perfect network says of its input, for data that are N(MEAN, STD**2)."""
    t = embedding.double().expand(len(given))
    if not isinstance(objective.path, VariancePreserving):
        t = t / 1000 if isinstance(objective.path, RectifiedFlow) else torch.exp(4 * t)
    alpha, sigma = objective.path.alpha(t), objective.path.sigma(t)
    wide_alpha, wide_sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    scale = input_scale(objective.prediction, alpha, sigma, objective.sigma_data)
    x = given.double() / scale[:, None, None, None]
    gain = wide_alpha * STD**2 / ((wide_alpha * STD) ** 2 + wide_sigma**2)
    x0 = MEAN + gain * (x - wide_alpha * MEAN)
    eps = (x - wide_alpha * x0) / wide_sigma
    return target(objective.prediction, x0, eps, alpha, sigma, objective.sigma_data).float()


@pytest.mark.parametrize("fields", OBJECTIVES, ids=str)
def test_exported_scheduler_solves_the_objectives_equation(fields: dict, tmp_path: Path) -> None:
    config = ObjectiveConfig(**fields)
    scheduler_of(config).save_pretrained(tmp_path)
    scheduler = type(scheduler_of(config)).from_pretrained(tmp_path)
    scheduler.set_timesteps(200)
    objective = objective_of(config)
    noise = normal(3, Purpose.INITIAL_NOISE, 0, torch.arange(300), (2, 4, 4))
    x = noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        output = best_output(objective, scheduler.scale_model_input(x, time), time)
        x = scheduler.step(output, time, x).prev_sample
    end = torch.tensor(objective.path.t_max, dtype=torch.float64)
    alpha, sigma = objective.path.alpha(end), objective.path.sigma(end)
    start = objective.path.prior_std * noise.double()
    exact = MEAN + STD * (start - alpha * MEAN) / ((alpha * STD).square() + sigma.square()).sqrt()
    assert (x - exact).abs().max() < 0.05
    assert abs(x.std() - exact.std()) < 0.01


def test_their_settings_say_what_was_trained() -> None:
    flow = scheduler_of(ObjectiveConfig()).config
    assert (flow.prediction_type, flow.use_flow_sigmas) == ("flow_prediction", True)
    v = scheduler_of(ObjectiveConfig(kind="ddpm", prediction="v", zero_terminal_snr=True)).config
    assert (v.prediction_type, v.rescale_betas_zero_snr, v.timestep_spacing) == ("v_prediction", True, "trailing")
    assert (v.beta_schedule, v.beta_start, v.beta_end) == ("scaled_linear", 0.00085, 0.012)
    edm = scheduler_of(ObjectiveConfig(kind="edm")).config
    assert (edm.sigma_data, edm.sigma_min, edm.sigma_max) == (1.0, 0.004, 160.0)
