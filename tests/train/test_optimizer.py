"""AdamW with its averages against plain torch, and groups of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import AverageConfig, OptimizerConfig
from pipeline.train.ema_profiles import gamma_of, power_decay
from pipeline.train.optimizer import AdamWithEMA, average_key, average_name, parameter_groups

CONFIG = OptimizerConfig(learning_rate=1e-2)
STEPS = 50
MAIN, FAST, POWER = (
    AverageConfig(decay=0.9),
    AverageConfig(name="fast", decay=0.0),
    AverageConfig(name="p", sigma_rel=0.1),
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5) -> None:
    tokens = torch.arange(5)
    for _ in range(count):
        optimizer.zero_grad()
        module(tokens).square().sum().backward()
        optimizer.step()


def test_weights_are_torch_adamw_and_the_averages_are_averages_of_them():
    ours, theirs = net(), net()
    optimizer = AdamWithEMA(parameter_groups(ours, 0.1), CONFIG, [MAIN, FAST, POWER])
    assert optimizer.state_keys == ("exp_avg", "exp_avg_sq", "ema.main", "ema.fast", "ema.p")
    steps(ours, optimizer, STEPS)
    plain = torch.optim.AdamW(
        parameter_groups(theirs, 0.1), lr=1e-2, betas=CONFIG.betas, eps=CONFIG.epsilon, fused=True
    )
    main, power = ([p.detach().clone() for p in theirs.parameters()] for _ in range(2))
    for step in range(1, STEPS + 1):
        steps(theirs, plain, 1)
        for weight, constant, profiled in zip(theirs.parameters(), main, power, strict=True):
            constant.lerp_(weight.detach(), 1 - min(0.9, (1 + step) / (10 + step)))
            profiled.lerp_(weight.detach(), 1 - power_decay(step, 0.1))
    for place, (weight, expected) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        found = optimizer.state[weight]
        assert torch.equal(weight, expected)
        assert torch.equal(found["ema.main"], main[place])
        assert torch.equal(found["ema.p"], power[place])
        assert torch.equal(found["ema.fast"], weight)
        assert not torch.equal(found["ema.main"], weight)
        assert not torch.equal(found["ema.main"], found["ema.p"])


def test_a_power_function_average_is_the_mean_that_its_profile_says():
    module = net()
    optimizer = AdamWithEMA(parameter_groups(module, 0.1), CONFIG, [POWER])
    seen = []
    for _ in range(STEPS):
        steps(module, optimizer, 1)
        seen.append(module[1].weight.detach().double().clone())
    edges = (torch.arange(STEPS + 1).double() / STEPS) ** (gamma_of(0.1) + 1)
    expected = torch.einsum("s,sij->ij", edges.diff(), torch.stack(seen))
    found = optimizer.state[module[1].weight]["ema.p"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_no_average_costs_no_state():
    module = net()
    optimizer = AdamWithEMA(parameter_groups(module, 0.1), CONFIG, [])
    steps(module, optimizer)
    assert optimizer.state_keys == ("exp_avg", "exp_avg_sq")
    assert optimizer.state[module[1].weight].keys() == {"step", "updates", "exp_avg", "exp_avg_sq"}


def test_the_names_of_states_tell_averages():
    assert average_key("main") == "ema.main"
    assert [average_name(key) for key in ("ema.main", "exp_avg", "weight")] == ["main", None, None]


def test_a_weight_without_gradient_keeps_its_average():
    module = net()
    optimizer = AdamWithEMA(parameter_groups(module, 0.0), CONFIG, [MAIN])
    unused = module[3].weight
    before = unused.detach().clone()
    module[1](torch.ones(8)).sum().backward()
    optimizer.step()
    assert torch.equal(optimizer.state[unused]["ema.main"], before)


def test_norms_biases_embeddings_do_not_decay_and_frozen_ones_are_left_out():
    module = net()
    module[3].weight.requires_grad_(False)
    decayed, plain = parameter_groups(module, 0.1)
    assert [p is module[1].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 5


def test_no_empty_groups():
    assert len(parameter_groups(nn.LayerNorm(3), 0.1)) == 1


def test_a_part_of_the_module_learns_at_its_own_rate():
    module = nn.ModuleDict({"unet": net(), "text": net()})
    groups = parameter_groups(module, 0.1, {"text.": 0.25})
    assert [(group["weight_decay"], group["rate_ratio"]) for group in groups] == [
        (0.1, 1.0),
        (0.0, 1.0),
        (0.1, 0.25),
        (0.0, 0.25),
    ]
    assert {id(p) for group in groups[2:] for p in group["params"]} == {id(p) for p in module["text"].parameters()}


def test_a_ratio_of_one_changes_no_group():
    module = nn.ModuleDict({"unet": net(), "text": net()})
    plain, same = parameter_groups(module, 0.1), parameter_groups(module, 0.1, {"text.": 1.0})
    assert len(plain) == 2
    for one, other in zip(plain, same, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]


@pytest.mark.parametrize("held_back", [2, 5])
def test_what_found_inf_holds_back_leaves_no_trace(held_back):
    undisturbed, disturbed = net(), net()
    plain, flagged = (AdamWithEMA(parameter_groups(n, 0.1), CONFIG, [MAIN, POWER]) for n in (undisturbed, disturbed))
    steps(undisturbed, plain)
    for step in range(6):
        flagged.found_inf = torch.tensor(float(step == held_back))
        steps(disturbed, flagged, 1)
        if step == held_back:
            flagged.take_back()
    assert plain.updates == flagged.updates == 5
    for ours, theirs in zip(disturbed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert flagged.state[ours]["step"] == 5
        for key in flagged.state_keys:
            assert torch.equal(flagged.state[ours][key], plain.state[theirs][key])
