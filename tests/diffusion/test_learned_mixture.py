"""A small network learns a mixture of Gaussians by every objective; samplers give the mixture back, in figures.

The figure is the sliced Wasserstein distance: mean distance of sorted projections, over directions. Samples of the
truth are not at distance 0 from each other either: a network is held against the distribution of their distances.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussian_mixture import Mixture
from torch import Tensor, nn

from pipeline.config import ObjectiveConfig, SamplingConfig
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.diffusion.sampler import sample

TRUTH = Mixture(
    [0.15, 0.25, 0.2, 0.3, 0.1],
    [[-1.1, 1.2], [1.0, 1.0], [1.3, -0.9], [-0.9, -0.9], [0.1, 0.0]],
    [0.1, 0.35, 0.15, 0.25, 0.05],
)  # of mean about 0 and standard deviation about 1, as whitened latents
SCHEDULES = ("linear", "scaled_linear", "cosine")
COUNT = 2000
OWN_ROUNDS, ROUNDS = 100, 5

FIRST_ORDER = {"sampler": "euler", "steps": 100}
SAMPLERS: list[dict[str, Any]] = [
    FIRST_ORDER,
    {"sampler": "ddim", "steps": 200, "eta": 1.0},
    {"sampler": "heun", "steps": 50},
    {"sampler": "dpm++", "steps": 50},
    {"sampler": "dpm++", "steps": 50, "grid": "log_snr"},
    {"sampler": "ode"},
]

OBJECTIVES: list[dict[str, Any]] = [
    {},
    {"timesteps": "uniform", "stratified": True},
    {"prediction": "x0"},
    *({"kind": "ddpm", "schedule": s, "prediction": p} for s in SCHEDULES for p in ("epsilon", "v", "x0")),
    {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True},
    {"kind": "ddpm", "prediction": "x0", "zero_terminal_snr": True},
    {"kind": "ddpm", "weighting": "min_snr"},
    {"kind": "edm"},
]
"""x0 has uniform times of its own on the flow, since few logit-normal ones are near clean data, where an error of x0
is an error of the result."""


class Network(nn.Module):
    """Two hidden layers and, as a UNet has, a way past them; the time, embedded as diffusers does, scales both.

    They see the place as waves too (random Fourier features, arXiv 2006.10739), or five modes take twice the steps.
    """

    def __init__(self, numbers: int = 2, widths: tuple[int, ...] = (128, 128), waves: int = 32) -> None:
        super().__init__()
        self.frequencies = 10_000 ** (-torch.arange(16) / 15)
        self.waves = 2 * torch.randn(numbers, waves)
        pairs = pairwise((numbers + 2 * waves + 32, *widths))
        hidden = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-1], numbers))
        self.scales = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        angle, phase = embedding[:, None] * self.frequencies, x @ self.waves
        time = torch.cat([angle.sin(), angle.cos()], 1)
        inner, past = self.scales(time).chunk(2, 1)
        made: Tensor = inner * self.layers(torch.cat([x, phase.sin(), phase.cos(), time], 1)) + past * x
        return made


def learned(objective: Objective, steps: int, batch: int = 256) -> Network:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Network()
    return trained(network, objective, TRUTH.draw(1_000_000, generator).float(), generator, steps, batch, 4e-3)


def trained(
    network: Network,
    objective: Objective,
    data: Tensor,
    generator: torch.Generator,
    steps: int,
    batch: int,
    rate: float,
) -> Network:
    optimizer = torch.optim.Adam(network.parameters(), rate, betas=(0.9, 0.99), fused=True)
    positions = torch.arange(batch)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        point = objective.at(x0, noise, objective.times(_numbers(objective, batch, generator), positions))
        error = (network(point.input, point.embedding) - point.target).square().mean(1)
        optimizer.zero_grad()
        (error * point.weight).mean().backward()
        optimizer.step()
    return network.eval()


def _numbers(objective: Objective, batch: int, generator: torch.Generator) -> Tensor:
    if objective.numbers == "normal":
        return torch.randn(batch, generator=generator)
    return torch.rand((batch, 2) if objective.numbers == "stratified" else batch, generator=generator)


@torch.no_grad()
def drawn(objective: Objective, network: Network, settings: dict[str, Any], seed: int) -> Tensor:
    noise = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(seed))
    fresh = torch.Generator().manual_seed(seed + 1_000_000)
    draw = lambda step: torch.randn(COUNT, 2, generator=fresh) if step else noise  # noqa: E731
    return sample(SamplingConfig(**settings), objective.path, objective.denoiser(network), draw).double()


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    angle = torch.arange(32, dtype=torch.float64) * (math.pi / 32)
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def truth(seed: int) -> Tensor:
    return TRUTH.draw(COUNT, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def own() -> Tensor:
    """Distances of the truth's samples from each other."""
    return torch.tensor([sliced_wasserstein(truth(i), truth(10_000 + i)) for i in range(OWN_ROUNDS)])


def hold_against_truth(config: dict[str, Any], steps: int, samplers: list[dict[str, Any]], own: Tensor) -> None:
    """Print the figures; the median must be within what 95 of 100 pairs of the truth's own samples have."""
    objective = objective_of(ObjectiveConfig(**config))
    network, wrong = learned(objective, steps), []
    allowed = float(own.quantile(0.95))
    for settings in samplers:
        apart = [sliced_wasserstein(drawn(objective, network, settings, i), truth(20_000 + i)) for i in range(ROUNDS)]
        median = float(torch.tensor(apart).median())
        line = f"{config} {settings}: {median:.4f}, {median / float(own.median()):.2f} times the truth's own"
        print(line)  # noqa: T201
        wrong += [line] if median > allowed else []
    assert not wrong, f"more than {allowed:.4f}: {wrong}"


def test_a_short_training_comes_near_the_truth(own: Tensor) -> None:
    config = {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True}
    hold_against_truth(config, 1500, [{"sampler": "dpm++", "grid": "karras"}], own)


@pytest.mark.long
@pytest.mark.parametrize("config", OBJECTIVES, ids=str)
def test_every_objective_and_sampler_comes_near_the_truth(config: dict[str, Any], own: Tensor) -> None:
    hold_against_truth(config, 16_000, SAMPLERS, own)


PIXELS, BRIGHT = 256, 0.2


def pictures(count: int, generator: torch.Generator) -> Tensor:
    """Dark or bright as a whole [count, PIXELS], of mean 0 and standard deviation about 1."""
    bright = torch.rand(count, 1, generator=generator) < BRIGHT
    return torch.where(bright, 1.8, -0.45) + 0.3 * torch.randn(count, PIXELS, generator=generator)


def share_of_bright(objective: Objective) -> float:
    """Among the pictures of a network that was trained for a while."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    data = pictures(50_000, generator)
    network = trained(Network(PIXELS, (256, 256), waves=0), objective, data, generator, 6000, 128, 2e-3)
    noise = torch.randn(4000, PIXELS, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        made = sample(SamplingConfig(steps=100), objective.path, objective.denoiser(network), lambda _: noise)
    share = float((made.mean(1) > 0.5).float().mean())
    print(f"{objective.prediction}, {objective.timesteps}, {objective.weighting}: {share:.3f} bright")  # noqa: T201
    return share


ZERO_TERMINAL = {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True}


@pytest.mark.long
@pytest.mark.parametrize("config", [{}, {"weighting": "p2"}, {"prediction": "x0"}, ZERO_TERMINAL], ids=str)
def test_near_pure_noise_it_is_decided_rightly_what_a_picture_is_to_be(config: dict[str, Any]) -> None:
    assert share_of_bright(objective_of(ObjectiveConfig(**config))) == pytest.approx(BRIGHT, abs=0.035)


@pytest.mark.long
@pytest.mark.parametrize("config", [{}, ZERO_TERMINAL], ids=str)
def test_weights_that_are_refused_hardly_learn_it(config: dict[str, Any]) -> None:
    """Where sampling begins at pure noise, min(SNR, gamma) falls to 0; what is decided there comes out wrong."""
    weights = {"weighting": "min_snr", "weighting_parameter": 5.0}
    assert share_of_bright(dataclasses.replace(objective_of(ObjectiveConfig(**config)), **weights)) > BRIGHT + 0.035


def test_the_figure_sees_what_is_wrong(own: Tensor) -> None:
    """A mode that is missing, or blurred by a tenth of the whole's spread, is far beyond the truth's own distances."""
    missing = Mixture(TRUTH.weights[:4].tolist(), TRUTH.means[:4].tolist(), TRUTH.stds[:4].tolist())
    blurred = truth(1) + 0.15 * torch.randn(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(missing.draw(COUNT, torch.Generator().manual_seed(0)), truth(2)) > own.max()
    assert sliced_wasserstein(blurred, truth(2)) > own.quantile(0.95)
    assert own.min() > 0
