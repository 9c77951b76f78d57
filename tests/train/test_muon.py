from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train.muon import Muon, orthogonalise


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int, seed: int) -> None:
    small = min(rows, columns)
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1.0, 0.2, small)) @ v
    result = orthogonalise(matrix).float()
    assert result.shape == matrix.shape
    values = torch.diag(u.T @ result @ v.T)
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_first_step_moves_by_the_learning_rate_against_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 2, 1, 2))
    weight.grad = torch.randn(4, 2, 1, 2)
    Muon([weight], learning_rate=0.1).step()
    assert (weight * weight.grad).sum() < 0
    assert torch.linalg.svdvals(weight.detach().flatten(1)).max() == pytest.approx(0.1, rel=0.4)


def test_weight_decay_shrinks_and_no_gradient_means_no_change() -> None:
    decayed, resting = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    decayed.grad = torch.zeros(2, 2)
    Muon([decayed, resting], learning_rate=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(resting.detach(), torch.ones(2, 2))


def test_it_solves_least_squares() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(8, 8), torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], learning_rate=0.1)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.1
