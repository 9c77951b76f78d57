"""Run files: every mistake is told with its field and its remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import runfile
from pipeline.config import JOBS, EncodeConfig, FirstStageConfig, PackConfig, TrainConfig
from pipeline.errors import ConfigError

MINIMAL = {"job": "train", "manifest": "m.json", "output": "out"}


def write(folder: Path, **fields: object) -> str:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **fields}))
    return str(file)


def problem(path: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        runfile.load(TrainConfig, path, list(overrides))
    return caught.value


@pytest.mark.parametrize("name", runfile.bundled_configs())
def test_every_bundled_run_file_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = runfile.load_any(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(runfile.dump(config))
    assert runfile.load_any(str(copy)) == config


@pytest.mark.parametrize("text", ["a\x85", "\x85b", "a\u2028b", "\u2029", "é\x85'\n"])
def test_line_ends_that_are_yamls_alone_survive_a_round_trip(text: str, tmp_path: Path) -> None:
    config = PackConfig(source=text, output=f"x{text}")
    copy = tmp_path / "copy.yaml"
    copy.write_text(runfile.dump(config))
    assert runfile.load_any(str(copy)) == config
    assert runfile.load_any(write(tmp_path), [f"init_from={{run: {runfile.in_line(text)}}}"]).init_from.run == text


def test_every_job_has_a_demo_run_file() -> None:
    assert {runfile.load_any(name).model_dump()["job"] for name in runfile.bundled_configs()} == set(JOBS)


def test_overrides_win_over_the_file_and_reach_references(tmp_path: Path) -> None:
    path = write(tmp_path, root="s3://a", manifest="${root}/latents/manifest.json", optimizer={"learning_rate": 1e-3})
    config = runfile.load(
        TrainConfig, path, ["root=s3://b", "optimizer.learning_rate=1e-4", "optimizer.betas=[0.8, 0.9]"]
    )
    assert config.manifest == "s3://b/latents/manifest.json"
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("fields", "said", "remedy"),
    [
        ({"stesp": 5}, "stesp: unknown field", "did you mean 'steps'?"),
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat: unknown field", "'learning_rate'"),
        ({"shuffle": 5}, "shuffle: unknown field", "did you mean 'shuffle_window'?"),
        ({"ema_decay": 0.99}, "ema_decay: unknown field", "did you mean 'ema'?"),
        ({"optimizer": {"betas": 3}}, "optimizer.betas: Input should be a valid list (got 3)", "mend"),
        ({"optimizer": 3}, "optimizer: Input should be a section (got 3)", "write it with its fields, as {"),
        (
            {"manifest": "", "datasets": ["s3://a/m.json"]},
            "datasets.0: Input should be a section (got 's3://a/m.json')",
            "write it with its fields, as {manifest: ...}",
        ),
        ({"zzz": 1}, "zzz: unknown field", "known fields: root, job"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1 (got 0)", "mend"),
        ({"steps": "many"}, "steps:", "mend"),
        ({"text": {"mode": "own"}}, "text.mode: Input should be 'joint', 'online' or 'cached' (got 'own')", "mend"),
        ({"text": {"mode": "online"}}, "text: towers: mode=online needs at least one", "mend"),
        ({"text": {"towers": [{"model": "ViT-L-14"}]}}, "text: towers: joint trains its own tower", "mend"),
        ({"text": {"mode": "cached", "width": 64}}, "text: width: mode=cached trains no tower", "mend"),
        ({"text": {"mode": "cached", "precision": "float16"}}, "text: precision: mode=cached runs no frozen", "mend"),
        (
            {"text": {"mode": "cached"}, "optimizer": {"text_learning_rate_ratio": 0.5}},
            "optimizer.text_learning_rate_ratio: text.mode=cached trains no text tower",
            "mend",
        ),
        ({"text": {"width": 100, "heads": 3}}, "width: 100 is not a multiple of heads=3", "mend"),
        ({"unet": {"block_out_channels": [64]}}, "must have the same length", "mend"),
        ({"unet": {"attention_head_dim": [4, 4, 4]}}, "unet: attention_head_dim: 3 values for 2 levels", "mend"),
        ({"unet": {"attention_head_dim": [4, 5]}}, "unet: block_out_channels: 128 is not a multiple of", "mend"),
        ({"unet": {"layers_per_block": 0}}, "unet.layers_per_block.0: Input should be greater than", "mend"),
        ({"unet": {"layers_per_block": [1, 0]}}, "unet.layers_per_block.1: Input should be greater than", "mend"),
        ({"unet": {"only_cross_attention": 3}}, "unet.only_cross_attention.0: Input should be", "mend"),
        ({"unet": {"addition_embed_type": "text"}}, "unet.addition_embed_type: Input should be 'text_time'", "mend"),
        (
            {
                "unet": {
                    "down_block_types": ["DownBlock2D"] * 2,
                    "up_block_types": ["UpBlock2D"] * 2,
                    "mid_block_type": None,
                }
            },
            "unet: down_block_types: no block looks at the text",
            "mend",
        ),
        ({"manifest": "${rot}/m.json"}, "${rot} refers to a field that is not set", "set it"),
        ({"root": "${root}"}, "${root} refers to itself", "circle"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate: Input should be a finite", "mend"),
        ({"objective": {"timestep_mean": float("nan")}}, "objective.timestep_mean: Input should be a finite", "mend"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0", "mend"),
        ({"steps": 10**20}, "steps: Input should be less than", "mend"),
        ({"engine": {"timeout_seconds": 1e300}}, "engine.timeout_seconds: Input should be less than", "mend"),
        (
            {"unet": {"block_out_channels": [], "down_block_types": [], "up_block_types": []}},
            "unet.block_out_channels: List should have at least 1 item",
            "mend",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path: Path, fields: dict[str, object], said: str, remedy: str) -> None:
    error = problem(write(tmp_path, **fields))
    assert said in error.message
    assert remedy in error.remedy
    assert "\n" not in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: [train]", "has job: ['train']"),
        ("job: train\n? [a, b]\n: 1\n", "a field's name must be one word"),
        ("job: train\noutput: &a [*a]\nmanifest: x\n", "holds a section within itself"),
        ("job: train\noutput: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_yaml_that_is_no_run_file_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    error = problem(str(file))
    assert said in error.message
    assert "\n" not in error.message


def test_a_name_too_long_for_a_file_is_told() -> None:
    assert "cannot be read: File name too long" in problem("x" * 5000).message


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("job: train\noutput: out\n")
    assert "manifest: missing" in problem(str(file)).message


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00", "a: 1\na: 2\njob: train"])
def test_a_file_that_is_no_run_file_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    problem(str(file))


def test_a_field_given_twice_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("job: train\nmanifest: a\noutput: b\nsteps: 1\nsteps: 2\n")
    assert "steps" in problem(str(file)).message


def test_the_file_of_another_command_is_told() -> None:
    error = problem("configs/demo/encode.yaml")
    assert "is for `lathe encode`, not for `lathe train`" in error.message


TWO = [{"manifest": "a.json", "weight": 1}, {"manifest": "b.json", "weight": 1}]


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, manifest="", datasets=TWO)
    config = runfile.load(TrainConfig, path, ["datasets.0.weight=3", "datasets.1={manifest: c.json, weight: 2}"])
    assert [(source.manifest, source.weight) for source in config.datasets] == [("a.json", 3), ("c.json", 2)]


@pytest.mark.parametrize("override", ["datasets.2.weight=1", "datasets.-1.weight=1", "datasets.x=1", "datasets.2=1"])
def test_a_place_that_a_list_has_not_is_told(tmp_path: Path, override: str) -> None:
    error = problem(write(tmp_path, manifest="", datasets=TWO), override)
    assert re.search("override .*: (2|-1|x) is none of the list's 2 places", error.message)
    assert "from 0 to 1" in error.remedy


def test_a_list_that_the_file_does_not_have_is_given_whole(tmp_path: Path) -> None:
    error = problem(write(tmp_path), "optimizer.betas.1=0.5")
    assert "optimizer.betas: Input should be a valid list" in error.message
    assert error.remedy == "give the whole list, optimizer.betas=[...]"


@pytest.mark.parametrize("override", ["steps", "=3", "manifest.x=1", "steps=[", "steps.deep=1"])
def test_an_override_that_cannot_be_is_told(tmp_path: Path, override: str) -> None:
    assert override.partition("=")[0].partition(".")[0] in problem(write(tmp_path), override).message


@pytest.mark.parametrize(
    ("field", "address"),
    [
        ("metrics.pushgateway", "http://user:pw1@host:9091"),
        ("metrics.pushgateway", "https://user:pw1/pw1@pw1@host"),
        ("metrics.pushgateway", "https://host/?token=pw1"),
        ("metrics.pushgateway", "user:pw1@host:9091"),
        ("metrics", "http://user:pw1@host:9091"),
        ("metrics.tensorboard", "s3://key:pw1/pw1@bucket/logs"),
        ("manifest", "s3://key:pw1/pw1/manifest.json"),
        ("root", "https://pw1@host/x"),
        ("unet.pretrained", "https://host/model?sig=pw1"),
        ("datasets", "[{manifest: 's3://key:pw1@bucket/manifest.json'}]"),
    ],
)
def test_no_run_file_holds_a_login_and_none_is_told(tmp_path: Path, field: str, address: str) -> None:
    error = problem(write(tmp_path), f"{field}={address}")
    assert f"run.yaml: {field}" in error.message
    assert "pw1" not in error.message + error.remedy
    assert "\n" not in error.message


def test_what_looks_like_a_login_and_is_none_is_left_alone(tmp_path: Path) -> None:
    said = "a photo of https://user:secret@host/?x=1"
    names = ["s3://bucket/0000?.tar", "/data/me@home/*.tar", "s3://bucket/a@b:c.tar"]
    config = runfile.load(EncodeConfig, "configs/demo/encode.yaml", [f"images.shards={names}"])
    assert config.images.shards == tuple(names)
    validation = {"every": 5, "autoencoder": "stabilityai/sd-vae-ft-mse", "prompts": [said, "https://host/?x=1"]}
    path = write(tmp_path, validation=validation, metrics={"pushgateway": "https://[::1]:9091/at/home"})
    assert runfile.load(TrainConfig, path).validation.prompts[0] == said
    pack = runfile.load(PackConfig, "configs/demo/pack.yaml", ["attribution=https://host/@me?by=x"])
    assert pack.attribution == "https://host/@me?by=x"


@pytest.mark.parametrize("factor", ["65", ".inf", ".nan"])
def test_pictures_may_not_grow_beyond_all_measure(factor: str) -> None:
    with pytest.raises(ConfigError, match=r"encode\.yaml: images\.max_upscale"):
        runfile.load(EncodeConfig, "configs/demo/encode.yaml", [f"images.max_upscale={factor}"])


def test_a_resolution_that_the_autoencoder_cannot_halve_is_told() -> None:
    with pytest.raises(ConfigError, match=r"train-vae\.yaml: images\.resolution: 50 is not a multiple of 8"):
        runfile.load(FirstStageConfig, "configs/demo/train-vae.yaml", ["images.resolution=50"])


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = runfile.load(TrainConfig, write(tmp_path))
    with pytest.raises(ValidationError):
        config.steps = 3  # type: ignore[misc]


@given(st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=30))
def test_any_text_in_an_override_is_a_value_or_a_config_error(text: str) -> None:
    try:
        config = runfile.load(TrainConfig, "configs/demo/train.yaml", [f"output={text}"])
    except ConfigError:
        return
    assert isinstance(config.output, str)
