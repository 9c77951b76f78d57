"""Run files' models: how pictures are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pipeline import runfile
from pipeline.config import SampleConfig, SamplingConfig
from pipeline.diffusion.grid import Grid
from pipeline.errors import ConfigError

RUN = "job: sample\nrun: run\nautoencoder: vae\noutput: out\nprompts: [a]\n"


def load(tmp_path: Path, *overrides: str) -> SampleConfig:
    (tmp_path / "run.yaml").write_text(RUN)
    return runfile.load(SampleConfig, str(tmp_path / "run.yaml"), list(overrides))


def test_sampling_is_set_by_overrides_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = load(
        tmp_path, "sampler=dpm++", "grid=log_snr", "steps=12", "guidance_rescale=0.7", "guidance_interval=[0.3, 5]"
    )
    assert (config.sampler, config.grid, config.steps) == ("dpm++", "log_snr", 12)
    assert config.guidance_interval == (0.3, 5.0)
    (tmp_path / "again.yaml").write_text(runfile.dump(config))
    assert runfile.load(SampleConfig, str(tmp_path / "again.yaml")) == config


def test_what_was_there_before_is_the_default(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.sampler, config.grid, config.steps, config.guidance) == ("euler", None, 25, 2.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler=dpm"], "sampler: Input should be 'euler', 'heun', 'ddim', 'dpm++' or 'ode'"),
        (["grid=cosine"], "grid: Input should be 'uniform', 'trailing', 'karras' or 'log_snr'"),
        (["eta=0.5"], "eta: sampler=euler draws no noise; set 0, or sampler to ddim"),
        (["sampler=ddim", "eta=1.5"], "eta: Input should be less than or equal to 1"),
        (["sampler=ode", "grid=karras"], "grid: karras, but sampler=ode chooses its own steps; set null"),
        (["guidance=1", "guidance_rescale=0.7"], "guidance_rescale: guidance=1 is no guidance"),
        (["guidance=1", "guidance_interval=[0, 5]"], "guidance_interval: guidance=1 is no guidance"),
        (["guidance_interval=[5, 0.3]"], "guidance_interval: [5, 0.3] is empty; give two numbers, 0 <= low < high"),
        (["guidance_interval=[-1, 3]"], "guidance_interval: [-1, 3] is empty"),
        (["tolerance=0"], "tolerance: Input should be greater than 0"),
        (["tolerance=1e-3"], "tolerance: sampler=euler makes the steps it is told; set null, or sampler to ode"),
        (["sampler=dpm++", "tolerance=1.0e-4"], "tolerance: sampler=dpm++ makes the steps it is told"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_run_files_and_grids_have_the_same_names() -> None:
    field = SamplingConfig.model_fields["grid"].annotation
    assert set(get_args(get_args(field)[0])) == set(get_args(Grid))
