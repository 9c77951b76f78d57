"""Targets and what they mean: there and back, and against the papers and diffusers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.diffusion.path import VariancePreserving
from pipeline.diffusion.prediction import Prediction, denoised, error_scale, input_scale, target

KINDS: tuple[Prediction, ...] = get_args(Prediction)


def tensors(alpha: float, sigma: float, count: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, count, 4, 2, 2, generator=generator, dtype=torch.float64)
    return x0, noise, *(torch.full((count,), value, dtype=torch.float64) for value in (alpha, sigma))


def mixed(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * noise


@pytest.mark.parametrize("kind", KINDS)
@given(angle=st.floats(0, math.pi / 2), size=st.floats(0.05, 100), sigma_data=st.floats(0.2, 3))
def test_the_target_means_the_data(kind: Prediction, angle: float, size: float, sigma_data: float) -> None:
    alpha, sigma = size * math.cos(angle), size * math.sin(angle)
    if kind == "epsilon" and alpha < 1e-4 * size:
        return  # refused by the run file's checks
    x0, noise, *levels = tensors(alpha, sigma)
    output = target(kind, x0, noise, *levels, sigma_data)
    found = denoised(kind, output, mixed(x0, noise, *levels), *levels, sigma_data)
    torch.testing.assert_close(found, x0, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "epsilon"])
def test_pure_noise_is_no_obstacle(kind: Prediction) -> None:
    x0, noise, *levels = tensors(0.0, 1.0)
    found = denoised(kind, target(kind, x0, noise, *levels, 1.0), noise, *levels, 1.0)
    torch.testing.assert_close(found, x0, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(angle=st.floats(0.01, 1.55), sigma_data=st.floats(0.2, 3))
def test_error_scale_is_the_slope_of_the_data_over_the_output(
    kind: Prediction, angle: float, sigma_data: float
) -> None:
    x, output, *levels = tensors(math.cos(angle), math.sin(angle))
    moved = denoised(kind, output + 1, x, *levels, sigma_data) - denoised(kind, output, x, *levels, sigma_data)
    torch.testing.assert_close(moved.square()[:, 0, 0, 0], error_scale(kind, *levels, sigma_data), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("row", [0, 350, 999])
def test_data_are_what_ddim_makes_of_an_output(kind: Prediction, theirs: str, row: int) -> None:
    scheduler = DDIMScheduler(prediction_type=theirs, clip_sample=False)
    scheduler.set_timesteps(1000)
    path, t = VariancePreserving.linear(), torch.full((3,), float(row), dtype=torch.float64)
    x, output, *_ = tensors(0, 0)
    expected = scheduler.step(output, row, x).pred_original_sample
    found = denoised(kind, output, x, path.alpha(t), path.sigma(t), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_is_preconditioned_as_in_the_paper(sigma: float) -> None:
    """c_in, c_skip, c_out of Karras et al. 2022, table 1, in diffusers' implementation."""
    scheduler = EDMEulerScheduler(sigma_data=0.7)
    x, output, *levels = tensors(1.0, sigma)
    scale = input_scale("edm", *levels, 0.7)[:, None, None, None]
    level = torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(x * scale, scheduler.precondition_inputs(x, level))
    torch.testing.assert_close(
        denoised("edm", output, x, *levels, 0.7), scheduler.precondition_outputs(x, output, level)
    )


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.2, 3))
def test_edm_gives_the_network_and_its_target_unit_variance(sigma: float, sigma_data: float) -> None:
    x0, noise, *levels = tensors(1.0, sigma, count=4000)
    x0 = x0 * sigma_data
    given_to_network = input_scale("edm", *levels, sigma_data)[:, None, None, None] * mixed(x0, noise, *levels)
    assert given_to_network.std().item() == pytest.approx(1, abs=0.03)
    assert target("edm", x0, noise, *levels, sigma_data).std().item() == pytest.approx(1, abs=0.03)


def test_nothing_but_edm_scales_its_input() -> None:
    for kind in KINDS:
        scale = input_scale(kind, torch.ones(2), torch.tensor([0.1, 3.0]), 1.0)
        assert (scale.tolist() == [1.0, 1.0]) == (kind != "edm")


def test_in_float32_small_noise_leaves_edms_target_exact() -> None:
    x0, noise, alpha, sigma = tensors(1.0, 1e-4)
    exact = target("edm", x0, noise, alpha, sigma, 1.0)
    rounded = target("edm", x0.float(), noise.float(), alpha.float(), sigma.float(), 1.0)
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-5, atol=1e-6)
