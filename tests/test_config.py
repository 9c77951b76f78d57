"""Run files' models: what a run is trained on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import config, runfile
from pipeline.config import DataSetConfig, LoaderConfig, TrainConfig
from pipeline.errors import ConfigError

RUN = "job: train\noutput: out\nroot: s3://mine\n"
TWO = "datasets:\n- {manifest: '${root}/a/manifest.json'}\n- {manifest: '${root}/b/manifest.json'}\n"


def load(tmp_path_factory: pytest.TempPathFactory, text: str, *overrides: str) -> TrainConfig:
    file = tmp_path_factory.mktemp("run") / "run.yaml"
    file.write_text(RUN + text)
    return runfile.load(TrainConfig, str(file), list(overrides))


def test_one_data_set_or_several(tmp_path_factory: pytest.TempPathFactory) -> None:
    one = load(tmp_path_factory, "manifest: m.json\n")
    assert one.sources == (DataSetConfig(manifest="m.json"),)
    several = load(tmp_path_factory, TWO)
    assert [source.manifest for source in several.sources] == ["s3://mine/a/manifest.json", "s3://mine/b/manifest.json"]
    part = load(tmp_path_factory, "", "datasets=[{manifest: m.json, share: 0.1, keys: keys.txt, weight: 2}]")
    assert part.sources == (DataSetConfig(manifest="m.json", share=0.1, keys="keys.txt", weight=2.0),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "manifest: missing; set it to a manifest.json, or set datasets to several"),
        ("datasets: []\n", "manifest: missing; set it to a manifest.json, or set datasets to several"),
        ("manifest: m.json\n" + TWO, "manifest: given, and datasets too; keep one of the two"),
        ("datasets: [{manifest: a}, {manifest: b}, {manifest: a}]", "datasets.2.manifest: a is named twice"),
        (
            "datasets: [{manifest: a, weight: 1}, {manifest: b}]",
            "datasets.1.weight: missing; give every data set a weight, or none",
        ),
        ("datasets: [{manifest: a, weight: 0}]", "datasets.0.weight: Input should be greater than 0"),
        ("datasets: [{manifest: a, share: 0}]", "datasets.0.share: Input should be greater than 0"),
        ("datasets: [{manifest: a, share: 1.1}]", "datasets.0.share: Input should be less than or equal to 1"),
        ("datasets: [{manifest: ''}]", "datasets.0.manifest: String should have at least 1 character"),
        ("datasets: [{}]", "datasets.0.manifest: missing"),
        ("manifest: m\nloader: {max_skip_rate: 1}", "loader.max_skip_rate: Input should be less than 1"),
        ("manifest: m\nloader: {requests: 0}", "loader.requests: Input should be greater than or equal to 1"),
        ("manifest: m\nloader: {cache_gib: 0}", "loader.cache_gib: Input should be greater than 0"),
        ("manifest: m\nema_decay: 0.99", "ema_decay: unknown field"),
        ("manifest: m\nunet: {pretrained: ''}", "unet.pretrained: String should have at least 1 character (got '')"),
        (
            "manifest: m\nunet: {pretrained: a}\ninit_from: {run: b}",
            "unet.pretrained: given, and init_from too; keep one of the two to begin with",
        ),
        (
            "manifest: m\nengine: {zero_stage: 0, offload_optimizer: true}",
            "engine: offload_optimizer: true, but DDP keeps its optimizer on the device; set zero_stage to 1, 2 or 3",
        ),
        (
            "manifest: m\nengine: {offload_parameters: true}",
            "engine: offload_parameters: true, but zero_stage 2 keeps whole weights; set zero_stage to 3",
        ),
        (
            "manifest: m\nengine: {zero_stage: 3, compile: true}",
            "engine: compile: true, but in ZeRO-3 torch compiles the hooks of every layer anew until it gives up; set",
        ),
        (
            "manifest: m\nengine: {precision: bfloat16, loss_scale: {initial_power: 8}}",
            "engine: loss_scale: set, but precision bfloat16 has none; set precision to float16, or leave it out",
        ),
        ("manifest: m\nengine: {zero_stage: 4}", "engine.zero_stage: Input should be 0, 1, 2 or 3"),
        ("manifest: m\nengine: {accumulation: 0}", "engine.accumulation: Input should be greater than or equal to 1"),
        ("manifest: m\nema: {averages: [{decay: 1}]}", "ema.averages.0.decay: Input should be less than 1"),
        ("manifest: m\nema: {averages: [{}]}", "ema.averages.0: main: give decay or sigma_rel, one of the two"),
        (
            "manifest: m\nema: {averages: [{decay: 0.9, sigma_rel: 0.1}]}",
            "ema.averages.0: main: give decay or sigma_rel, one of the two",
        ),
        (
            "manifest: m\nema: {averages: [{sigma_rel: 0.3}]}",
            "ema.averages.0: sigma_rel: 0.3 is above 0.2886, where all steps of the training weigh the same; set one",
        ),
        (
            "manifest: m\nema: {averages: [{sigma_rel: 1.0e-200}]}",
            "ema.averages.0: sigma_rel: 1e-200 is below 0.001: so short an average spans few steps, as one of constant",
        ),
        ("manifest: m\nema: {averages: [{sigma_rel: 0}]}", "ema.averages.0: sigma_rel: 0 is no share of the training;"),
        ("manifest: m\nema: {averages: [{sigma_rel: -1}]}", "ema.averages.0: sigma_rel: -1 is no share of the"),
        ("manifest: m\nema: {averages: [{name: raw, decay: 0.9}]}", "ema.averages.0: name: raw means the weights"),
        ("manifest: m\nema: {averages: [{name: a:b, decay: 0.9}]}", "ema.averages.0.name: String should match"),
        ("manifest: m\nema: {averages: [{decay: 0.9}, {decay: 0.99}]}", "ema: averages: two have the same name"),
        (
            "manifest: m\nema: {averages: [{sigma_rel: 0.1}, {name: b, sigma_rel: 0.1}]}",
            "ema: averages: two have the same sigma_rel",
        ),
        ("manifest: m\nema: {snapshot_every: 10}", "ema: snapshot_every: snapshots are of averages with sigma_rel"),
        ("manifest: m\nema: {snapshot_keep: 5}", "ema: snapshot_keep: 5, but no snapshots are taken; set null, or"),
        (
            "manifest: m\noptimizer: {reference_steps: 100}",
            "optimizer: reference_steps: schedule=cosine has no such scale; set null, or schedule to inverse_sqrt or",
        ),
        (
            "manifest: m\noptimizer: {schedule: linear, reference_steps: 1}",
            "optimizer: reference_steps: schedule=linear has",
        ),
        (
            "manifest: m\noptimizer: {schedule: edm2, final_learning_rate_ratio: 0.1}",
            "optimizer: final_learning_rate_ratio: schedule=edm2 has no last rate; set 0, or schedule to cosine or",
        ),
        (
            "manifest: m\noptimizer: {schedule: constant, final_learning_rate_ratio: 0.1}",
            "optimizer: final_learning_rate_ratio: schedule=constant has",
        ),
        ("manifest: m\noptimizer: {schedule: step}", "optimizer.schedule: Input should be 'constant', 'cosine'"),
        (
            "manifest: m\noptimizer: {text_learning_rate_ratio: 0}",
            "optimizer.text_learning_rate_ratio: Input should be",
        ),
        ("manifest: m\nloader: {mixing: both}", "loader.mixing: Input should be 'steps' or 'batches'"),
        ("manifest: m\nloader: {cache: ''}", "loader.cache: String should have at least 1 character"),
        ("manifest: m\nloader: {cache_gib: 1.0e+300}", "loader.cache_gib: Input should be less than"),
        *(
            (f"manifest: m\n{text}", f"{field}: Input should be a number, not true or false (got ")
            for text, field in (
                ("global_batch: true", "global_batch"),
                ("seed: off", "seed"),
                ("loader: {workers: yes}", "loader.workers"),
                ("loader: {requests: true}", "loader.requests"),
                ("optimizer: {learning_rate: true}", "optimizer.learning_rate"),
                ("optimizer: {betas: [0.9, false]}", "optimizer.betas"),
                ("engine: {zero_stage: true}", "engine.zero_stage"),
            )
        ),
        ("datasets: [{manifest: a, weight: yes}]", "datasets.0.weight: Input should be a number, not true or false"),
    ],
)
def test_data_sets_that_cannot_be_are_told(tmp_path_factory: pytest.TempPathFactory, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path_factory, text)
    assert f"run.yaml: {said}" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_field_misspelt_in_a_list_is_told_with_the_nearest_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path_factory, "datasets: [{manifest: a, wieght: 2}]")
    assert "datasets.0.wieght: unknown field" in caught.value.message
    assert "did you mean 'weight'?" in caught.value.remedy


def test_data_sets_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = load(tmp_path_factory, TWO, "loader.mixing=batches", "loader.cache=/cache", "loader.on_damage=skip")
    file = tmp_path_factory.mktemp("copy") / "run.yaml"
    file.write_text(runfile.dump(run))
    assert runfile.load(TrainConfig, str(file)) == run
    assert run.loader == LoaderConfig(mixing="batches", cache="/cache", on_damage="skip")


@given(st.lists(st.sampled_from([None, 0.5, 1.0, 2.0]), min_size=1, max_size=5))
def test_all_have_a_weight_or_none(weights: list[float | None]) -> None:
    sources = tuple(DataSetConfig(manifest=str(i), weight=weight) for i, weight in enumerate(weights))
    try:
        assert TrainConfig(output="out", datasets=sources).sources == sources
        mixed = False
    except ValidationError:
        mixed = True
    assert mixed == (None in weights and any(weights))


def test_the_package_names_all_its_models() -> None:
    import pipeline.data.arguments  # which has a section of its own, not of run files

    assert pipeline.data.arguments.State in _below(config.Section)
    models = {kind.__name__ for kind in _below(config.Section) if kind.__module__.startswith("pipeline.config.")}
    assert models <= set(config.__all__)


def _below(kind: type) -> list[type]:
    return [each for child in kind.__subclasses__() for each in (child, *_below(child))]
