"""Held-out losses: the same at any world size and step; which settings go together."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config import DataSetConfig, ObjectiveConfig, TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.prepare import Scale
from pipeline.diffusion.objective import objective_of
from pipeline.diffusion.variational_bound import bits, factors
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.watchdog import Watchdog
from pipeline.train.grids import Grids
from pipeline.train.held_out_losses import HeldOutLosses, Losses
from pipeline.train.validation import Validator


@dataclass
class Ranks:
    """One of several; what all of them sum up it must be told."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    watch: Watchdog = field(default_factory=Watchdog)
    summed: list[Tensor] = field(default_factory=list)
    everyones: list[list[Tensor]] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        return flag

    def first(self, flag: bool) -> None:
        assert not flag

    def agree(self, problem: Exception | None) -> None:
        if problem:
            raise problem

    def sum(self, values: Tensor) -> Tensor:
        self.summed.append(values.double())
        place = len(self.summed) - 1
        return sum(one[place] for one in self.everyones) if self.everyones else values.double()


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


def losses(settings: TrainConfig, share: float, ranks: Ranks | None = None, batch_size: int = 4) -> Losses:
    datasets = open_datasets([DataSetConfig(manifest=settings.manifest)], global_batch=4)
    scale = Scale("whiten", datasets.mean, datasets.std)
    held_out = HeldOutLosses(settings, ranks or Ranks(), datasets, scale, batch_size=batch_size)
    return held_out.of(Net(share), lambda: None)


def test_unchanged_weights_have_the_same_losses_to_the_bit(latents):
    found = losses(config(latents), 0.5)
    assert found == losses(config(latents, seed=5, objective={"caption_dropout": 0.7}), 0.5)
    assert found.loss != losses(config(latents), 0.6).loss
    other = config(latents, validation={"every": 10, "samples": 7, "noise_levels": 3, "seed": 1})
    assert found.loss != losses(other, 0.5).loss
    assert list(found.by_level) == ["0_0.00-0.55", "1_0.55-0.84", "2_0.84-1.00"]
    assert found.bound_bits is None


def test_names_of_noise_levels_sort_as_text(latents):
    names = list(losses(config(latents, validation={"every": 10, "samples": 1, "noise_levels": 12}), 0.5).by_level)
    assert names == sorted(names)
    assert [name.partition("_")[0] for name in names[:2] + names[-2:]] == ["00", "01", "10", "11"]


@pytest.mark.parametrize("objective", [{}, {"kind": "ddpm"}, {"kind": "edm"}], ids=str)
def test_ranks_together_say_what_one_says(latents, objective):
    settings = config(latents, objective=objective)
    alone = losses(settings, 0.5, batch_size=7)
    ranks = [Ranks(rank, 3) for rank in range(3)]
    for rank in ranks:
        losses(settings, 0.5, rank, batch_size=2)
    shared = losses(settings, 0.5, Ranks(1, 3, everyones=[rank.summed for rank in ranks]), batch_size=2)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-6)
    assert shared.by_level == pytest.approx(alone.by_level, rel=1e-6)
    assert (shared.bound_bits or 0) == pytest.approx(alone.bound_bits or 0, rel=1e-6)
    assert (alone.bound_bits is None) == (objective != {"kind": "ddpm"})


def test_held_out_latents_that_are_not_finite_are_named(tmp_path, make_latents):
    def spoil(number, moments):
        if number in (43, 45):
            moments[0, 1, 2] = float("nan")

    folder = tmp_path / "spoilt"
    said = f"held-out latents are not finite: 0043 in 00000.tar, 0045 in 00000.tar of {folder}"
    with pytest.raises(DataError, match=re.escape(said)) as told:
        losses(config(make_latents(folder, change=spoil)), 0.5)
    assert f"`lathe verify {folder}` names all such samples" in told.value.remedy


def test_the_whole_is_the_mean_of_its_parts_where_nothing_is_weighted(latents):
    found = losses(config(latents), 0.5)
    assert found.loss == pytest.approx(sum(found.by_level.values()) / 3)
    weighted = losses(config(latents, objective={"weighting": "p2", "weighting_parameter": 1}), 0.5)
    assert weighted.by_level == found.by_level
    assert weighted.loss != found.loss


def test_the_bound_is_estimated_from_all_rows(latents):
    """A network that says nothing of the noise is wrong by 1 in each dimension, so the bound is known."""
    ddpm = {"kind": "ddpm"}
    objective = objective_of(ObjectiveConfig(**ddpm))
    expected = bits(objective, factors(objective).sum().item(), 0.0)
    for parts, off in ((20, 0.1), (100, 0.05)):
        fields = {"every": 10, "samples": 8, "noise_levels": parts}
        assert losses(config(latents, objective=ddpm, validation=fields), 0.0).bound_bits == pytest.approx(
            expected, rel=off
        )


class Engine:
    """One whose average is twice its weights."""

    def __init__(self) -> None:
        self.module = Net(0.5)

    @contextmanager
    def using(self, key):
        assert key == "ema.main"
        self.module.share *= 2
        try:
            yield
        finally:
            self.module.share /= 2


@dataclass
class Told:
    """What a validator tells."""

    lines: list = field(default_factory=list)

    def log(self, step, values):
        self.lines.append((step, values))


def validator(latents: str, engine: Engine, told: Told, stops_after: int = 1000) -> Validator:
    settings, left = config(latents), iter([False] * stops_after)
    datasets = open_datasets([DataSetConfig(manifest=latents)], global_batch=4)
    return Validator(
        settings,
        Ranks(),
        engine,
        datasets=datasets,
        scale=Scale("whiten", datasets.mean, datasets.std),
        batch_size=4,
        towers=None,
        metrics=told,
        store=None,
        stopped=lambda: next(left, True),
    )


def test_averages_and_raw_weights_are_told_apart(latents, capfd):
    engine, told = Engine(), Told()
    checked = validator(latents, engine, told)
    assert [step for step in range(2001) if checked.due(step)] == [*range(10, 2001, 10)]
    checked.run(10)
    ((step, values),) = told.lines
    assert step == 10
    assert values["validation_loss"] == {
        name: losses(config(latents), s).loss for name, s in (("main", 1), ("raw", 0.5))
    }
    assert list(values["validation_level_loss"]) == ["main", "raw"]
    assert values["validation_seconds"] > 0
    assert engine.module.training
    assert "validation after step 10: main " in capfd.readouterr().err
    assert checked._ranks.watch.place.phase == "validates, pass 12"


@pytest.mark.parametrize("passes", [0, 1, 6, 11])
def test_one_who_asks_to_stop_is_heard_between_forward_passes(latents, capfd, passes):
    engine, told = Engine(), Told()
    validator(latents, engine, told, stops_after=passes).run(10)
    assert told.lines == []
    assert (engine.module.share, engine.module.training) == (0.5, True)
    assert capfd.readouterr().err == "validation after step 10 was broken off\n"


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


def test_a_grid_that_the_objective_cannot_have_is_told_before_the_first_step(latents):
    pictures = {"prompts": ["a cat"], "autoencoder": "nowhere", "sampling": {"grid": "trailing"}}
    settings = config(latents, validation={"every": 10, **pictures})
    datasets = open_datasets([DataSetConfig(manifest=latents)], global_batch=4)
    scale = Scale("whiten", datasets.mean, datasets.std)
    with pytest.raises(ConfigError, match=r"^grid: trailing is for"):
        Grids(settings, Ranks(), datasets.manifests[0], scale, batch_size=4)
