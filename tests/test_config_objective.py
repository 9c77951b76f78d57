"""Objectives in run files: what belongs together is filled in, what contradicts itself is refused in one line."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from pipeline import runfile
from pipeline.config import ObjectiveConfig, TrainConfig
from pipeline.errors import ConfigError


def load(folder: Path, **objective: Any) -> ObjectiveConfig:
    file = folder / "run.yaml"
    fields = ", ".join(f"{name}: {value}" for name, value in objective.items())
    file.write_text(f"job: train\nmanifest: m\noutput: o\nobjective: {{{fields}}}\n")
    return runfile.load(TrainConfig, str(file), []).objective


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"prediction": "velocity", "timesteps": "logit_normal", "timestep_mean": 0, "timestep_std": 1}),
        ({"kind": "ddpm"}, {"prediction": "epsilon", "timesteps": "uniform", "schedule": "scaled_linear"}),
        ({"kind": "edm"}, {"prediction": "edm", "weighting": "edm", "timestep_mean": -0.5, "timestep_std": 1.2}),
        ({"kind": "ddpm", "weighting": "min_snr"}, {"weighting_parameter": 5, "timestep_mean": None}),
        ({"prediction": "x0"}, {"timesteps": "uniform", "timestep_mean": None, "timestep_std": None}),
        ({"prediction": "x0", "timesteps": "logit_normal"}, {"timesteps": "logit_normal", "timestep_std": 1}),
        ({"prediction": "x0", "timestep_mean": -0.5}, {"timesteps": "logit_normal", "timestep_mean": -0.5}),
        ({"kind": "ddpm", "prediction": "x0"}, {"timesteps": "uniform"}),
        ({"kind": "ddpm", "weighting": "soft_min_snr"}, {"weighting_parameter": 4}),
        ({"weighting": "p2", "weighting_parameter": 0.5}, {"weighting_parameter": 0.5}),
        (
            {"kind": "ddpm", "timesteps": "logit_normal", "timestep_mean": 0.7},
            {"timestep_mean": 0.7, "timestep_std": 1},
        ),
    ],
)
def test_a_choice_brings_along_what_belongs_to_it(given: dict, expected: dict, tmp_path: Path) -> None:
    found = load(tmp_path, **given)
    assert {name: getattr(found, name) for name in expected} == expected
    again = ObjectiveConfig.model_validate(found.model_dump(mode="json"))
    assert again == found  # as a checkpoint's run file is read
    with_nulls = ObjectiveConfig(**{name: given.get(name) for name in ObjectiveConfig.model_fields})
    assert with_nulls == found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prediction": "epsilon"}, "prediction: epsilon does not go with kind=rectified_flow; set velocity or x0"),
        (
            {"kind": "ddpm", "prediction": "velocity"},
            "prediction: velocity does not go with kind=ddpm; set epsilon or v",
        ),
        ({"kind": "edm", "prediction": "x0"}, "prediction: x0 does not go with kind=edm; set edm"),
        ({"kind": "edm", "timesteps": "uniform"}, "timesteps: uniform does not go with kind=edm; set log_normal"),
        ({"kind": "ddpm", "timesteps": "log_normal"}, "timesteps: log_normal does not go with kind=ddpm"),
        ({"weighting": "edm"}, "weighting: edm does not go with kind=rectified_flow; set none or p2"),
        *(
            (
                {"weighting": name, "prediction": said},
                f"weighting: {name} hardly weighs the noise end of kind=rectified",
            )
            for name in ("min_snr", "soft_min_snr")
            for said in ("velocity", "x0")
        ),
        ({"kind": "edm", "weighting": "none"}, "weighting: none does not go with kind=edm; set edm or"),
        ({"schedule": "linear"}, "schedule: linear is of kind=ddpm, not of rectified_flow; set null"),
        ({"kind": "edm", "zero_terminal_snr": True}, "zero_terminal_snr: kind=edm ends in noise as it is; set false"),
        ({"kind": "ddpm", "zero_terminal_snr": True}, "prediction: epsilon says nothing of the data at the last step"),
        (
            {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True, "weighting": "min_snr"},
            "weighting: min_snr gives the last step of zero_terminal_snr=true weight 0",
        ),
        (
            {"kind": "ddpm", "prediction": "v", "zero_terminal_snr": True, "offset_noise": 0.1},
            "offset_noise: sampling from the pure noise of zero_terminal_snr=true has none",
        ),
        ({"kind": "edm", "offset_noise": 0.1}, "offset_noise: is for ddpm"),
        ({"offset_noise": 0.1}, "offset_noise: is for ddpm"),
        (
            {"kind": "ddpm", "timestep_mean": 0.4},
            "timestep_mean, timestep_std: timesteps=uniform has none; set both to",
        ),
        ({"weighting_parameter": 5}, "weighting_parameter: weighting=none has none; set null"),
        (
            {"prediction": "x0", "weighting": "p2", "weighting_parameter": 0.5},
            "weighting_parameter: 0.5, but below 1 p2 weighs x0 without bound towards clean data",
        ),
        ({"kind": "flow"}, "objective.kind: Input should be 'rectified_flow', 'ddpm' or 'edm'"),
        ({"weighting": "snr"}, "objective.weighting: Input should be"),
        ({"weighting": "[1]"}, "objective.weighting: Input should be"),
        ({"timestep_std": 0}, "objective.timestep_std: Input should be greater than 0"),
        ({"min_snr": 5}, "objective.min_snr: unknown field"),
    ],
)
def test_a_contradiction_is_named_with_its_remedy(fields: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **fields)
    assert "objective" in caught.value.message
    assert said in caught.value.message
    assert "\n" not in str(caught.value.message)


def test_every_combination_either_works_or_is_refused() -> None:
    choices = {
        name: get_args(ObjectiveConfig.model_fields[name].annotation) for name in ("kind", "prediction", "weighting")
    }
    passed = 0
    for kind, prediction, weighting, zero in itertools.product(*choices.values(), [False, True]):
        with contextlib.suppress(ValueError):
            ObjectiveConfig(kind=kind, prediction=prediction, weighting=weighting, zero_terminal_snr=zero)
            passed += 1
    assert passed == 2 * 2 + 3 * 4 + 4 + 2  # flow, ddpm, edm, and v and x0 with zero terminal SNR


def test_the_users_page_tells_every_field_and_choice_and_its_examples_load() -> None:
    page = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    examples = re.findall(r"^objective: (\{.*?\})", page, re.MULTILINE)
    assert len(examples) == 4
    for example in examples:
        ObjectiveConfig(**yaml.safe_load(example))
    rows = re.findall(r"^\| `(\w+): (\S+)`(.*?) \| ", page, re.MULTILINE)
    told = {field for field, *_ in rows} | {"prediction", "timestep_mean", "timestep_std", "weighting_parameter"}
    assert told == set(ObjectiveConfig.model_fields)
    for field in ("kind", "schedule", "timesteps", "weighting", "prediction"):
        values = re.findall(r"'(\w+)'", str(ObjectiveConfig.model_fields[field].annotation))
        assert values
        for value in values:
            assert re.search(rf"[`: ]{value}[`, ]", page), value
