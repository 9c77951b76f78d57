"""Held-out losses: the same at any world size and step; which settings go together."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config import DataSetConfig, TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.prepare import Scale
from pipeline.train.held_out_losses import HeldOutLosses, Losses


@dataclass
class Ranks:
    """One of several, which keeps its sums to itself."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        return values.double()


class Net(nn.Module):
    """Says a share of what it sees; nothing of the text."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, noisy: Tensor, *_shown: Tensor | None) -> Tensor:
        return self.share * noisy


def config(latents: str, **fields: object) -> TrainConfig:
    changes = {"validation": {"every": 10, "samples": 7, "noise_levels": 3}, **fields}
    return TrainConfig.model_validate({"manifest": latents, "output": "/run", "text": {"context_length": 8}, **changes})


def losses(settings: TrainConfig, share: float, rank: int = 0, world_size: int = 1, batch_size: int = 4) -> Losses:
    datasets = open_datasets([DataSetConfig(manifest=settings.manifest)], global_batch=4)
    scale = Scale("whiten", datasets.mean, datasets.std)
    held_out = HeldOutLosses(settings, Ranks(rank, world_size), datasets, scale, batch_size=batch_size)
    return held_out.of(Net(share), lambda: None)


def test_unchanged_weights_have_the_same_losses_to_the_bit(latents):
    found = losses(config(latents), 0.5)
    assert found == losses(config(latents, seed=5, objective={"caption_dropout": 0.7}), 0.5)
    assert found.loss != losses(config(latents), 0.6).loss
    other = config(latents, validation={"every": 10, "samples": 7, "noise_levels": 3, "seed": 1})
    assert found.loss != losses(other, 0.5).loss
    assert list(found.by_level) == ["0_0.00-0.55", "1_0.55-0.84", "2_0.84-1.00"]
    assert found.bound_bits is None


@pytest.mark.parametrize("objective", [{}, {"kind": "ddpm"}, {"kind": "edm"}], ids=str)
def test_ranks_together_say_what_one_says(latents, objective):
    settings = config(latents, objective=objective)
    alone = losses(settings, 0.5, batch_size=7)
    counts = [3, 3, 1]
    shared = [losses(settings, 0.5, rank, 3, batch_size=2) for rank in range(3)]
    for part in ("loss", "bound_bits"):
        if getattr(alone, part) is not None:
            mean = sum(getattr(one, part) * count for one, count in zip(shared, counts, strict=True)) / 7
            assert mean == pytest.approx(getattr(alone, part), rel=1e-6)
    assert (alone.bound_bits is None) == (objective != {"kind": "ddpm"})


def test_the_whole_is_the_mean_of_its_parts_where_nothing_is_weighted(latents):
    found = losses(config(latents), 0.5)
    assert found.loss == pytest.approx(sum(found.by_level.values()) / 3)
    weighted = losses(config(latents, objective={"weighting": "p2", "weighting_parameter": 1}), 0.5)
    assert weighted.by_level == found.by_level
    assert weighted.loss != found.loss


@pytest.mark.parametrize(
    ("validation", "said"),
    [
        ({"weights": ["main", "other"]}, "validation.weights.1: other is no average in ema.averages; set main or raw"),
        ({"weights": ["raw", "raw"]}, "weights.1: raw is named twice; leave one out"),
        ({"prompts": ["a cat"]}, "autoencoder: missing, and prompts need it"),
        ({"autoencoder": "vae"}, "prompts: none, but an autoencoder for them"),
        ({"sampling": {"sampler": "ode"}}, "sampling.sampler: ode asks the network more often on one rank"),
    ],
)
def test_settings_that_do_not_go_together(validation, said):
    with pytest.raises(ValidationError) as told:
        config("manifest.json", validation={"every": 10, **validation})
    assert said in str(told.value)
