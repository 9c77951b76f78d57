"""The adaptive solver on equations whose solutions are known."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_mixture import Mixture
from torch import Tensor

from pipeline.diffusion.ode import dormand_prince, probability_flow
from pipeline.diffusion.path import RectifiedFlow, VariancePreserving
from pipeline.errors import LatheError


def circle(u: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-y[:, 1], y[:, 0]], 1)


@pytest.mark.parametrize("end", [5.0, -5.0])
def test_the_error_follows_the_tolerance(end: float) -> None:
    start = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    unit = torch.tensor([math.cos(end), math.sin(end)], dtype=torch.float64)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        y = dormand_prince(circle, start, 0.0, end, tolerance=tolerance)
        errors.append(float((y - start[:, :1] * unit).abs().max()) / tolerance)
    assert all(0.05 < error < 50 for error in errors)


def test_a_step_has_order_five() -> None:
    """Without control, as the tolerance lets anything pass, the first step is a hundredth of the way."""
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    errors = []
    for end in (0.4, 0.8):
        seen: list[Tensor] = []

        def record(u: Tensor, y: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(torch.cat([u[:, None], y], 1))
            return circle(u, y)

        dormand_prince(record, y, 0.0, 100 * end, tolerance=1e9)
        u, cosine, _ = seen[6][0].tolist()  # the last stage of the first step is its solution
        assert u == pytest.approx(end)
        errors.append(abs(cosine - math.cos(end)))
    assert math.log2(errors[1] / errors[0]) == pytest.approx(6, abs=0.5)


def test_each_sample_has_steps_of_its_own() -> None:
    speeds = torch.tensor([[1.0], [30.0]], dtype=torch.float64)
    field = lambda u, y: -speeds[: len(y)] * (y - u[:, None].cos())  # noqa: E731
    slow = dormand_prince(field, torch.zeros(1, 1, dtype=torch.float64), 0.0, 2.0, tolerance=1e-5)
    both = dormand_prince(field, torch.zeros(2, 1, dtype=torch.float64), 0.0, 2.0, tolerance=1e-5)
    assert torch.equal(both[:1], slow)


def test_progress_rises_to_one_and_the_end_is_met() -> None:
    told: list[float] = []
    seen: list[float] = []

    def field(u: Tensor, y: Tensor) -> Tensor:
        seen.append(float(u[0]))
        return circle(u, y)

    dormand_prince(field, torch.ones(1, 2), 1.0, 3.0, tolerance=1e-3, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert max(seen) == 3.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_told(wrong: float) -> None:
    asked: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        asked.append(len(x))
        return torch.where(t[:, None] < 0.5, wrong, x)

    with pytest.raises(LatheError, match=r"sampler=ode cannot keep to tolerance=0\.001") as caught:
        probability_flow(RectifiedFlow(), denoiser, torch.ones(2, 3), tolerance=1e-3)
    assert "not finite" in caught.value.remedy
    assert len(asked) < 300


def test_it_asks_for_fewer_evaluations_than_it_has_digits_of_error() -> None:
    mixture = Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.2])
    path, asked = VariancePreserving.scaled_linear(), 0
    denoise = mixture.denoiser(path)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return denoise(x, t)

    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    rough = probability_flow(path, counted, x, tolerance=1e-3)
    fine = probability_flow(path, denoise, x.double(), tolerance=1e-8)
    assert asked < 100
    assert (rough - fine).abs().mean() < 5e-3
