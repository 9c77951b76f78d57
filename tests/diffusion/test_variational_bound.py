"""The variational bound against Ho et al.'s own formulas, and against data whose likelihood is known."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.diffusion.path import VariancePreserving
from pipeline.diffusion.variational_bound import bits, draw_weights, end_term, factors, has_bound

STD = 0.7  # of Gaussian data of mean 0
ENTROPY_BITS = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
PATHS = [VariancePreserving.linear(), VariancePreserving.scaled_linear(), VariancePreserving.cosine()]


def of(path: VariancePreserving, prediction: str = "x0") -> Objective:
    return Objective(path=path, prediction=prediction, timesteps="uniform")


def bound_of_gaussian(path: VariancePreserving, worse: float = 0.0) -> float:
    """Of the best denoiser, whose squared error is known, or of one that is worse by so much."""
    alpha_squared = path.alphas_cumprod
    error = STD**2 * (1 - alpha_squared) / (alpha_squared * STD**2 + 1 - alpha_squared) + worse
    end = end_term(of(path), torch.tensor([[STD]]))
    return bits(of(path), float((factors(of(path)) * error).sum()), end.item())


def cross_entropy_of_chain(path: VariancePreserving) -> float:
    """E_q[log q(x_1...x_T | x_0) - log p(x_0...x_T)] of the best denoiser, from variances and covariances alone."""
    cumulative = [1.0, *path.alphas_cumprod.tolist()]
    variance = [a * STD**2 + 1 - a for a in cumulative]
    nats = 0.5 * math.log(2 * math.pi) + variance[-1] / 2  # -log p(x_T)
    for t in range(1, len(cumulative)):
        here, before = cumulative[t], cumulative[t - 1]
        beta = 1 - here / before
        posterior = (1 - before) / (1 - here) * beta or beta
        guess = math.sqrt(here) * STD**2 / variance[t]  # of x_0, times x_t
        mean = (math.sqrt(before) * beta * guess + math.sqrt(1 - beta) * (1 - before)) / (1 - here)
        covariance = math.sqrt(1 - beta) * variance[t - 1]
        off = variance[t - 1] - 2 * mean * covariance + mean**2 * variance[t]
        nats += 0.5 * math.log(2 * math.pi * posterior) + off / (2 * posterior)  # -log p(x_(t-1) | x_t)
        nats -= 0.5 * math.log(2 * math.pi * math.e * beta)  # entropy of q(x_t | x_(t-1))
    return nats / math.log(2)


@pytest.mark.parametrize("path", PATHS)
def test_the_bound_of_gaussian_data_is_that_of_the_whole_chain(path):
    assert bound_of_gaussian(path) == pytest.approx(cross_entropy_of_chain(path), rel=1e-9)
    assert bound_of_gaussian(path) > ENTROPY_BITS
    assert bound_of_gaussian(path, worse=0.001) > bound_of_gaussian(path) + 1


def test_ever_smaller_steps_reach_the_entropy():
    gaps = []
    for rows in (300, 3_000, 30_000):
        path = VariancePreserving(torch.sigmoid(torch.linspace(12, -12, rows, dtype=torch.float64)))
        gaps.append(bound_of_gaussian(path) - ENTROPY_BITS)
    assert gaps[0] > 9 * gaps[1] > 81 * gaps[2] > 0
    assert gaps[2] < 0.01


@pytest.mark.parametrize("path", [*PATHS, VariancePreserving.linear().rescaled_to_zero_terminal_snr()])
def test_each_row_is_ho_et_als_divergence(path):
    """Eq. 6 to 8 of Ho et al., term by term, for one x0 and a wrong estimate of it."""
    x0, estimate = 1.3, 0.4
    cumulative = path.alphas_cumprod.tolist()
    for row in (1, 2, 50, 500, len(cumulative) - 1):
        here, before = cumulative[row], cumulative[row - 1]
        beta = 1 - here / before
        variance = (1 - before) / (1 - here) * beta
        off = math.sqrt(before) * beta / (1 - here) * (x0 - estimate)  # of the two means: the part of x_t cancels
        found = factors(of(path))[row].item() * (x0 - estimate) ** 2
        assert found == pytest.approx(off**2 / (2 * variance), rel=1e-9)
        if here:  # the same of what else a network says: its error is that of the data, scaled
            noise_error = math.sqrt(here / (1 - here)) * (x0 - estimate)
            assert factors(of(path, "epsilon"))[row].item() * noise_error**2 == pytest.approx(found, rel=1e-6)
    first = torch.distributions.Normal(torch.tensor(estimate, dtype=torch.float64), math.sqrt(1 - cumulative[0]))
    found = bits(of(path), factors(of(path))[0].item() * (x0 - estimate) ** 2, 0.0) * math.log(2)
    assert found == pytest.approx(-first.log_prob(torch.tensor(x0, dtype=torch.float64)).item(), rel=1e-9)


def test_rows_count_once_however_often_they_are_drawn():
    rows = torch.tensor([1, 4, 4, 9, 1, 4])
    weights = draw_weights(torch.arange(10).double(), rows)
    assert weights.nonzero().flatten().tolist() == [1, 4, 9]
    assert weights[rows].sum().item() == pytest.approx(45)
    assert [weights[1].item() * 2, weights[4].item() * 3, weights[9].item()] == [0 + 1 + 2, 3 + 4 + 5 + 6, 7 + 8 + 9]
    everything = draw_weights(torch.arange(10).double(), torch.arange(10).flip(0))
    assert everything.tolist() == list(range(10))


def test_the_end_is_the_divergence_from_noise():
    path, x0 = VariancePreserving.scaled_linear(), torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    last = path.alphas_cumprod[-1]
    noised = torch.distributions.Normal(last.sqrt() * x0.double(), (1 - last).sqrt())
    expected = torch.distributions.kl_divergence(noised, torch.distributions.Normal(0.0, 1.0)).mean(1)
    assert torch.allclose(end_term(of(path), x0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"kind": "ddpm"}, True),
        ({"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True}, True),
        ({"kind": "ddpm", "timesteps": "logit_normal"}, False),
        ({"kind": "ddpm", "offset_noise": 0.1}, False),
        ({"kind": "edm"}, False),
        ({}, False),
    ],
)
def test_which_objectives_have_one(fields, has):
    assert has_bound(objective_of(ObjectiveConfig(**fields))) == has
