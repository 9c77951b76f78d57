"""The paths, against diffusers' tables and the papers' ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from hypothesis import given
from hypothesis import strategies as st

from pipeline.diffusion.path import Path, RectifiedFlow, VarianceExploding, VariancePreserving

TABLES = {
    "linear": (VariancePreserving.linear, {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (VariancePreserving.scaled_linear, {"beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (VariancePreserving.cosine, {}),
}
PATHS: dict[str, Path] = {
    "flow": RectifiedFlow(),
    "edm": VarianceExploding(),
    "cosine": VariancePreserving.cosine(),
    "linear": VariancePreserving.linear(),
    "zero": VariancePreserving.scaled_linear().rescaled_to_zero_terminal_snr(),
}


def table(name: str, zero: bool) -> tuple[VariancePreserving, DDIMScheduler]:
    make: Callable[[], VariancePreserving] = TABLES[name][0]
    theirs = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero, **TABLES[name][1])
    return make().rescaled_to_zero_terminal_snr() if zero else make(), theirs


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_diffusers_up_to_their_float32(name: str, zero: bool) -> None:
    ours, theirs = table(name, zero)
    rows = torch.arange(1000)
    assert torch.allclose(ours.alpha(rows.float()), theirs.alphas_cumprod.sqrt(), atol=1e-6)
    assert torch.allclose(ours.sigma(rows.float()), (1 - theirs.alphas_cumprod).sqrt(), atol=2e-5)
    x0, noise = torch.randn(2, 1000, 3, 2, 2)
    a, s = (f(rows.float())[:, None, None, None] for f in (ours.alpha, ours.sigma))
    assert torch.allclose(a * x0 + s * noise, theirs.add_noise(x0, noise, rows), atol=1e-4)
    assert torch.allclose(a * noise - s * x0, theirs.get_velocity(x0, noise, rows), atol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr_keeps_the_first_row_and_ends_in_noise(name: str) -> None:
    before, after = TABLES[name][0](), TABLES[name][0]().rescaled_to_zero_terminal_snr()
    ends = torch.tensor([0.0, 999.0], dtype=torch.float64)
    assert after.alpha(ends).tolist() == [pytest.approx(before.alpha(ends)[0].item(), abs=1e-15), 0.0]
    assert after.sigma(ends)[1] == 1
    assert before.alpha(ends)[1] > 0


def test_the_ends_are_those_of_the_papers() -> None:
    assert VariancePreserving.linear().alphas_cumprod[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
    assert VariancePreserving.scaled_linear().alphas_cumprod[-1].item() == pytest.approx(0.004660, rel=1e-3)
    flow, edm = RectifiedFlow(), VarianceExploding()
    assert (flow.t_min, flow.t_max, flow.prior_std) == (0, 1, 1)
    assert (edm.t_min, edm.t_max, edm.prior_std) == (0.002, 80, 80)


@pytest.mark.parametrize("name", PATHS)
@given(share=st.floats(0, 1))
def test_time_of_undoes_the_ratio(name: str, share: float) -> None:
    path = PATHS[name]
    t = torch.tensor([path.t_min + share * (path.t_max - path.t_min)], dtype=torch.float64)
    ratio = path.sigma(t) / path.alpha(t)
    assert torch.allclose(path.time_of(ratio), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_noise_grows_all_along_the_path_and_dtypes_are_kept(name: str) -> None:
    path = PATHS[name]
    t = torch.linspace(path.t_min, path.t_max, 20_001, dtype=torch.float64)
    angle = torch.atan2(path.sigma(t), path.alpha(t))
    assert (angle.diff() > 0).all()
    for function in (path.alpha, path.sigma, path.embedding_input):
        assert function(t.float()).dtype == torch.float32
        assert function(t.float()).shape == t.shape
        assert torch.isfinite(function(t)).all()


def test_between_rows_the_log_snr_is_linear() -> None:
    path = VariancePreserving.cosine()
    t = torch.tensor([500.0, 500.25, 501.0], dtype=torch.float64)
    log = (path.alpha(t) / path.sigma(t)).log()
    assert log[1].item() == pytest.approx((0.75 * log[0] + 0.25 * log[2]).item(), abs=1e-12)
    assert torch.allclose(path.alpha(t).square() + path.sigma(t).square(), torch.ones(3, dtype=torch.float64))


def test_before_pure_noise_alpha_is_linear() -> None:
    path = VariancePreserving.linear().rescaled_to_zero_terminal_snr()
    alpha = path.alpha(torch.tensor([998.0, 998.5, 999.0], dtype=torch.float64))
    assert alpha[1].item() == pytest.approx(alpha[0].item() / 2, rel=1e-12)
    assert path.time_of(torch.tensor([math.inf])).item() == 999


def test_a_path_may_begin_before_its_last_row_and_moves_between_devices() -> None:
    path = VariancePreserving.cosine().beginning_at(-10.2)
    ends = torch.tensor([path.t_max, path.t_max + 1], dtype=torch.float64)
    log_snr = 2 * (path.alpha(ends) / path.sigma(ends)).log()
    assert log_snr[0] >= -10.2 > log_snr[1]
    assert path.to("cpu").t_max == path.t_max < 999
    assert VariancePreserving.linear().beginning_at(-10.2).t_max == 999
    assert RectifiedFlow().to("cpu").t_max == 1


def test_embeddings_are_what_diffusers_passes() -> None:
    assert RectifiedFlow().embedding_input(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 500.0, 1000.0]
    assert VariancePreserving.linear().embedding_input(torch.tensor([7.0])).item() == 7
    sigma = torch.tensor([0.01, 1.0, 50.0])
    assert torch.equal(VarianceExploding().embedding_input(sigma), EDMEulerScheduler().precondition_noise(sigma))
