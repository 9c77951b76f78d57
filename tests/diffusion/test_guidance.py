"""Classifier-free guidance by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.guidance import guided, rescaled
from pipeline.diffusion.objective import Objective, objective_of

X = torch.zeros(2, 1, 2, 2)
TOKENS, EMPTY = torch.tensor([[2, 2], [4, 4]]), torch.tensor([1, 1])


def network(x: Tensor, time: Tensor, tokens: Tensor, mask: None = None) -> Tensor:
    return x + time.reshape(-1, 1, 1, 1) + tokens.float().mean(1).reshape(-1, 1, 1, 1)


@pytest.fixture
def of_data() -> Objective:
    return objective_of(ObjectiveConfig(prediction="x0"))


def test_guidance_extrapolates_from_the_empty_prompt(of_data: Objective) -> None:
    t = torch.tensor([0.5, 0.25])
    plain = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=1.0)(X, t)
    strong = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=3.0)(X, t)
    assert plain[:, 0, 0, 0].tolist() == [502.0, 254.0]
    assert strong[:, 0, 0, 0].tolist() == [501.0 + 3 * 1, 251.0 + 3 * 3]


@pytest.mark.parametrize("config", [{}, {"kind": "ddpm"}, {"kind": "ddpm", "prediction": "v"}, {"kind": "edm"}])
def test_guidance_of_the_data_is_guidance_of_the_output(config: dict) -> None:
    objective = objective_of(ObjectiveConfig(**config))
    x, t = (
        torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)),
        torch.tensor([objective.path.t_max * 0.6, objective.path.t_max * 0.3]),
    )
    empty = EMPTY.expand(2, 2)
    by_output = objective.denoiser(
        lambda x, time: network(x, time, empty) + 4 * (network(x, time, TOKENS) - network(x, time, empty))
    )
    by_data = guided(network, objective, (TOKENS, None), (EMPTY[None], None), scale=4.0)
    torch.testing.assert_close(by_data(x, t), by_output(x, t), rtol=1e-3, atol=1e-3)


def test_the_network_sees_the_empty_prompt_only_where_guidance_acts(of_data: Objective) -> None:
    sizes: list[int] = []

    def counted(x: Tensor, time: Tensor, tokens: Tensor, mask: None = None) -> Tensor:
        sizes.append(len(x))
        return network(x, time, tokens)

    within, beyond = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])  # ratios 1; 9 and 1/9
    guided(counted, of_data, (TOKENS, None), (EMPTY[None], None), scale=1.0)(X, within)
    guided(counted, of_data, (TOKENS, None), (EMPTY[None], None), scale=2.0)(X, within)
    guided(counted, of_data, (TOKENS, None), (EMPTY[None], None), scale=2.0, interval=(0.5, 5.0))(X, within)
    guided(counted, of_data, (TOKENS, None), (EMPTY[None], None), scale=2.0, interval=(0.5, 5.0))(X, beyond)
    assert sizes == [2, 4, 4, 2]


def test_the_interval_is_of_each_sample_s_own_noise_level(of_data: Objective) -> None:
    t = torch.tensor([0.5, 1.0])  # at t = 1 the ratio is infinite
    plain = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=1.0)(X, t)
    all_over = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=3.0)(X, t)
    some = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=3.0, interval=(0.5, 1.0))(X, t)
    assert torch.equal(some[0], all_over[0])
    assert torch.equal(some[1], plain[1])
    lower_end = guided(network, of_data, (TOKENS, None), (EMPTY[None], None), scale=3.0, interval=(1.0, 5.0))(X, t)
    assert torch.equal(lower_end, plain)


def test_rescaling_brings_the_spread_back_and_not_the_mean_alone() -> None:
    text = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    strong = 5 * text + 0.1
    assert torch.allclose(rescaled(strong, text).flatten(1).std(1), text.flatten(1).std(1))
    assert torch.allclose(rescaled(strong, text), strong / 5, atol=1e-6)


def test_rescaling_is_blended(of_data: Objective) -> None:
    def uneven(x: Tensor, time: Tensor, tokens: Tensor, mask: None = None) -> Tensor:
        return x * tokens.float().mean(1).reshape(-1, 1, 1, 1)

    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 0.5])
    made = [
        guided(uneven, of_data, (TOKENS, None), (EMPTY[None], None), scale=3.0, rescale=share)(x, t).flatten(1).std(1)
        for share in (0.0, 0.7, 1.0)
    ]
    plain = guided(uneven, of_data, (TOKENS, None), (EMPTY[None], None), scale=1.0)(x, t).flatten(1).std(1)
    assert torch.allclose(made[2], plain)
    assert torch.allclose(made[1], 0.7 * plain + 0.3 * made[0])  # Lin et al. 2023, eq. 16
    assert (made[0] > made[1]).all()
