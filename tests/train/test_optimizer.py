"""AdamW with its average against plain torch, and the learning rate's shape."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config import OptimizerConfig
from pipeline.train.optimizer import AdamWithEMA, ema_decay_at, learning_rate, parameter_groups

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, final_learning_rate_ratio=0.1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5) -> None:
    tokens = torch.arange(5)
    for _ in range(count):
        optimizer.zero_grad()
        module(tokens).square().sum().backward()
        optimizer.step()


def test_weights_are_torch_adamw_and_the_average_is_an_average_of_them():
    ours, theirs = net(), net()
    optimizer = AdamWithEMA(parameter_groups(ours, 0.1), CONFIG, ema_decay=0.9)
    steps(ours, optimizer)
    plain = torch.optim.AdamW(
        parameter_groups(theirs, 0.1), lr=1e-2, betas=CONFIG.betas, eps=CONFIG.epsilon, fused=True
    )
    average = [p.detach().clone() for p in theirs.parameters()]
    for step in range(1, 6):
        steps(theirs, plain, 1)
        for mean, weight in zip(average, theirs.parameters(), strict=True):
            mean.lerp_(weight.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
    for mean, weight, expected in zip(average, ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight, expected)
        assert torch.equal(optimizer.state[weight]["ema"], mean)
        assert not torch.equal(mean, weight)


def test_a_weight_without_gradient_keeps_its_average():
    module = net()
    optimizer = AdamWithEMA(parameter_groups(module, 0.0), CONFIG, ema_decay=0.9)
    unused = module[3].weight
    before = unused.detach().clone()
    module[1](torch.ones(8)).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[unused]["ema"], before)


def test_average_lets_go_of_the_start():
    assert [ema_decay_at(step, 0.999) for step in (1, 90)] == pytest.approx([2 / 11, 0.91])
    assert ema_decay_at(10**6, 0.999) == 0.999
    assert ema_decay_at(5, 0.0) == 0.0


def test_norms_biases_embeddings_do_not_decay_and_frozen_ones_are_left_out():
    module = net()
    module[3].weight.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p is module[1].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 5


def test_no_empty_groups():
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


def test_learning_rate_warms_up_peaks_and_ends_at_its_ratio():
    rates = [learning_rate(step, CONFIG, 104) for step in range(105)]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert rates[54] == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5))  # half of the cosine
    assert rates[104] == pytest.approx(1e-3)


@given(step=st.integers(0, 10**7), warmup=st.integers(0, 10**4), total=st.integers(1, 10**7), ratio=st.floats(0, 1))
def test_learning_rate_stays_within_its_bounds(step, warmup, total, ratio):
    config = OptimizerConfig(learning_rate=3e-4, warmup_steps=warmup, final_learning_rate_ratio=ratio)
    rate = learning_rate(step, config, total)
    assert 0 <= rate <= 3e-4 * (1 + 1e-12)
    assert math.isfinite(rate)
