"""Weights by the papers' formulas, in the space of what each network predicts."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.diffusion.path import VarianceExploding, VariancePreserving
from pipeline.diffusion.weighting import edm, min_snr, p2, snr, soft_min_snr

ROWS = torch.arange(1000)
X = torch.zeros(1000, 1, 1, 1)


def weights(prediction: str, weighting: str, gamma: float) -> torch.Tensor:
    path = VariancePreserving.scaled_linear()
    objective = Objective(path, prediction, "uniform", weighting=weighting, weighting_parameter=gamma)
    return objective.at(X, X, ROWS.float()).weight


@pytest.fixture(scope="module")
def their_snr() -> torch.Tensor:
    return compute_snr(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), ROWS)


def test_min_snr_is_that_of_diffusers_training_scripts(their_snr: torch.Tensor) -> None:
    """Hang et al. 2023: min(SNR, gamma), over SNR for epsilon and over SNR + 1 for v."""
    least = their_snr.clamp(max=5)
    for prediction, divisor in (("epsilon", their_snr), ("v", their_snr + 1), ("x0", 1)):
        torch.testing.assert_close(weights(prediction, "min_snr", 5.0), least / divisor, rtol=2e-4, atol=1e-5)


def test_p2_divides_epsilons_loss(their_snr: torch.Tensor) -> None:
    """Choi et al. 2022: lambda' = lambda / (k + SNR)^gamma, with lambda of the simple loss and k = 1."""
    for gamma in (0.5, 1.0):
        expected = 1 / (1 + their_snr).pow(gamma)
        torch.testing.assert_close(weights("epsilon", "p2", gamma), expected, rtol=2e-4, atol=1e-5)


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.2, 3))
def test_soft_min_snr_is_the_authors(sigma: float, sigma_data: float) -> None:
    """Crowson et al.'s code weighs EDM's output by (s d)^2 / (s^2 + d^2)^2 with gamma = 1 / d^2."""
    objective = Objective(
        VarianceExploding(),
        "edm",
        "log_normal",
        weighting="soft_min_snr",
        weighting_parameter=sigma_data**-2,
        sigma_data=sigma_data,
    )
    t = torch.tensor([sigma], dtype=torch.float64)
    expected = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2
    assert objective.at(X[:1], X[:1], t).weight.item() == pytest.approx(expected, rel=1e-6)


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.2, 3))
def test_edms_weight_is_the_papers_and_one_for_its_output(sigma: float, sigma_data: float) -> None:
    """Karras et al. 2022, table 1: lambda = (s^2 + d^2) / (s d)^2, which times c_out^2 is 1."""
    found = edm(torch.tensor(sigma, dtype=torch.float64) ** -2, sigma_data).item()
    assert found == pytest.approx((sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2, rel=1e-9)
    objective = Objective(VarianceExploding(), "edm", "log_normal", weighting="edm", sigma_data=sigma_data)
    weight = objective.at(X[:1], X[:1], torch.tensor([sigma], dtype=torch.float64)).weight
    assert weight.item() == pytest.approx(1, rel=1e-6)


def test_limits() -> None:
    ends = torch.tensor([0.0, 1e16])
    assert min_snr(ends, 5.0).tolist() == [0, 5]
    assert soft_min_snr(ends, 4.0).tolist() == [0, 4]
    assert p2(ends, 1.0).tolist() == [0, 1]
    assert snr(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])).tolist() == [pytest.approx(1e16), 0, 1]
    between = torch.tensor([5.0])
    assert soft_min_snr(between, 5.0).item() == 2.5  # half of the hard minimum, where that bends


@pytest.mark.parametrize("gamma", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("weighting", ["none", "min_snr", "soft_min_snr", "p2"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_flow_has_bounded_weights_wherever_a_run_file_may_ask_for_them(
    prediction: str, weighting: str, gamma: float
) -> None:
    parameter = None if weighting == "none" else gamma
    try:
        config = ObjectiveConfig(prediction=prediction, weighting=weighting, weighting_parameter=parameter)
    except ValueError:
        assert weighting in ("min_snr", "soft_min_snr") or (prediction, weighting, gamma) == ("x0", "p2", 0.1)
        return
    t = torch.cat([torch.tensor([0.0, 1e-30, 1e-9, 1e-6]), torch.linspace(1e-3, 1.0, 996)])
    weight = objective_of(config).at(X, X, t).weight
    assert (weight >= 0).all()
    assert weight.max() <= max(gamma, 1.0)
