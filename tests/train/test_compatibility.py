"""Run file, latents and checkpoint that do not fit together are refused by name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from pipeline import runfile
from pipeline.config import DataSetConfig, TrainConfig
from pipeline.data.datasets import DataSets, open_datasets
from pipeline.data.manifest import MANIFEST, BucketCount, Manifest, Tower, digest_of, load_manifest
from pipeline.errors import ConfigError, DataError
from pipeline.models.text import Tokenizer
from pipeline.storage import open_store
from pipeline.train import start
from pipeline.train.checkpoint import CONFIG, FORMAT_VERSION, RUN, Checkpoint, noted
from pipeline.train.compatibility import check_alike, check_data, check_resume
from pipeline.train.initial import what_was_learned
from pipeline.train.trained_on import files


def config(**changes) -> TrainConfig:
    sources = {} if "datasets" in changes else {"manifest": "m"}
    return TrainConfig.model_validate(
        {**sources, "output": "o", "text": {"context_length": 8}, "global_batch": 8, **changes}
    )


def data(*urls: str, **changes) -> DataSets:
    return open_datasets([DataSetConfig(manifest=url, **changes) for url in urls], global_batch=8)


@pytest.fixture
def manifest(latents) -> Manifest:
    return load_manifest(latents)


@pytest.fixture
def saved(tmp_path, latents) -> Checkpoint:
    store = open_store(str(tmp_path / "run"))
    now, run = data(latents), json.dumps({"format_version": FORMAT_VERSION}).encode()
    texts = {CONFIG: runfile.dump(config()).encode(), **files(now, now.mean, now.std), RUN: run}
    for name, text in texts.items():
        store.write(f"step-00000001/{name}", text)
    return Checkpoint(store, "step-00000001", {name: noted(text) for name, text in texts.items()})


def test_what_fits_passes(manifest, latents, saved):
    check_data(config(), manifest)
    now = config(steps=9, optimizer={"learning_rate": 1.0}, engine={"zero_stage": 1})
    check_resume(saved, now, data(latents))
    check_resume(saved, config(unet={"pretrained": "elsewhere"}), data(latents))  # what it began with is past


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"kind": "edm"}, r"^objective\.kind: edm, .* has rectified_flow\n"),
        ({"prediction": "x0"}, r"^objective\.prediction: x0, .* has velocity\n"),
    ],
)
def test_another_meaning_of_the_networks_output(saved, latents, objective, said):
    with pytest.raises(ConfigError, match=said):
        check_resume(saved, config(objective=objective), data(latents))


def test_times_and_weights_may_change_on_the_way(saved, latents):
    now = {"timesteps": "uniform", "stratified": True, "weighting": "p2", "caption_dropout": 0.2}
    check_resume(saved, config(objective=now), data(latents))


def test_context_length_of_another_encoding(manifest):
    with pytest.raises(ConfigError, match=r"text\.context_length: 16.*8 tokens"):
        check_data(config(text={"context_length": 16}), manifest)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_captions_that_are_no_token_ids_for_a_tower_in_training(manifest, mode):
    other = manifest.model_copy(update={"fingerprint": manifest.fingerprint.model_copy(update={"text_mode": mode})})
    with pytest.raises(ConfigError, match=rf"^text\.mode: joint, .* text\.mode={mode}\n.*text\.mode=joint"):
        check_data(config(), other)


def test_every_picture_size_must_halve_as_often_as_the_unet_does(manifest):
    shards = tuple(
        entry.model_copy(update={"buckets": (BucketCount(bucket=(32, 48), train=1, holdout=0), *entry.buckets)})
        for entry in manifest.shards
    )
    mark = manifest.fingerprint.model_copy(update={"buckets": ((32, 48), (32, 32))})
    wide = manifest.model_copy(update={"fingerprint": mark, "shards": shards})
    check_data(config(), wide)
    three = {"block_out_channels": [32] * 3, "down_block_types": ["x"] * 3, "up_block_types": ["x"] * 3}
    with pytest.raises(ConfigError, match=r"4x6 latents, those of 32x48 pictures, cannot be\n.*step=32") as error:
        check_data(config(unet=three), wide)
    assert "\n" not in error.value.message


def test_towers_of_different_lengths(manifest):
    tower = manifest.fingerprint.text_towers[0]
    both = (tower, tower.model_copy(update={"name": "b", "context_length": 7}))
    mark = manifest.fingerprint.model_copy(update={"text_mode": "cached", "text_towers": both})
    with pytest.raises(ConfigError, match=r"^text\.towers: .* 7 and 8 tokens by tower"):
        check_data(
            config(text={"mode": "cached", "context_length": 8}), manifest.model_copy(update={"fingerprint": mark})
        )


def test_more_levels_than_the_latents_have_halvings(manifest):
    four = {"block_out_channels": [32] * 4, "down_block_types": ["x"] * 4, "up_block_types": ["x"] * 4}
    with pytest.raises(ConfigError, match=r"unet\.block_out_channels.*4x4"):
        check_data(config(unet=four), manifest)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"unet": {"block_out_channels": [64, 64]}}, r"unet\.block_out_channels: \[64, 64\].*\[64, 128\]"),
        ({"text": {"context_length": 8, "layers": 3}}, r"text\.layers: 3.*2"),
        ({"seed": 7}, r"seed: 7.*0"),
        ({"normalisation": "scaling_factor"}, "normalisation: scaling_factor.*whiten"),
        ({"global_batch": 16}, "global_batch: 16.*8"),
        ({"shuffle_window": 1}, "shuffle_window: 1.*256"),
        ({"loader": {"flip": False}}, r"loader\.flip: false.*true"),
        ({"ema": {"averages": [{"decay": 0.9}]}}, r"ema\.averages\.0\.decay: 0\.9.*0\.999"),
        ({"ema": {"averages": []}}, r"ema\.averages: \[\], but .*main"),
    ],
)
def test_a_field_that_a_run_keeps(latents, saved, changes, field):
    with pytest.raises(ConfigError, match=field):
        check_resume(saved, config(**changes), data(latents))


def remedies(saved: Checkpoint, now: TrainConfig, latents: str) -> Iterator[str]:
    """The override that a refusal gives, as a shell reads it."""
    try:
        check_resume(saved, now, data(latents))
    except ConfigError as error:
        word, override = shlex.split(error.remedy.removesuffix(", or train into another output"))
        yield override if word == "set" else ""


@pytest.mark.parametrize(
    "changes",
    [
        {"ema": {"averages": [{"name": "main", "sigma_rel": 0.05}]}},
        {"ema": {"averages": []}},
        {"ema": {"averages": [{"decay": 0.999}, {"name": "long", "sigma_rel": 0.1}]}},
        {"unet": {"block_out_channels": [64, 64]}},
        {"objective": {"kind": "edm"}},
        {"loader": {"flip": False}},
    ],
    ids=str,
)
def test_remedies_can_be_pasted(tmp_path, latents, saved, changes):
    """One after the other, into a run file that does not name the field."""
    file, pasted = tmp_path / "train.yaml", []
    file.write_text("job: train\nmanifest: m\noutput: o\ntext: {context_length: 8}\nglobal_batch: 8\n")
    given = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    for _ in range(3):
        now = runfile.load(TrainConfig, str(file), [*given, *pasted])
        pasted += remedies(saved, now, latents)
    assert pasted
    check_resume(saved, now, data(latents))


@pytest.mark.parametrize("restart", [False, True])
def test_latents_of_another_meaning(tmp_path, saved, manifest, make_latents, restart):
    other = manifest.fingerprint.model_copy(update={"autoencoder_weights": "other", "resize_filter": "box"})
    url = make_latents(tmp_path / "other", other)
    with pytest.raises(DataError, match="differ in autoencoder_weights, resize_filter"):
        check_resume(saved, config(restart_order=restart), data(url))


def test_a_manifest_of_an_older_format(saved, latents, manifest):
    older = manifest.model_copy(update={"format_version": 1}).to_bytes()
    saved.store.write(f"step-00000001/{MANIFEST}", older)
    saved.files[MANIFEST] = noted(older)
    with pytest.raises(DataError, match=r"step-00000001/manifest\.json has format version 1"):
        check_resume(saved, config(), data(latents))


def test_other_samples_of_the_same_meaning(tmp_path, saved, latents, manifest, make_latents):
    other = make_latents(tmp_path / "other", manifest.fingerprint, seed=1)
    for now, said in [
        (data(other), "the list of shards has changed"),
        (data(latents, share=0.5), "weight, share, keys or loader.mixing was changed"),
        (data(latents, other), "it had 1 data sets, and there are 2"),
    ]:
        with pytest.raises(DataError, match=f"trained on other samples: {said}") as error:
            check_resume(saved, config(), now)
        assert "restart_order=true" in error.value.remedy
        check_resume(saved, config(restart_order=True), now)


def test_a_checkpoint_of_another_format_says_so_first(saved, latents):
    run = json.dumps({"format_version": FORMAT_VERSION - 1}).encode()
    saved.store.write(f"step-00000001/{RUN}", run)
    saved.files[RUN] = noted(run)
    del saved.files["latents.json"]
    with pytest.raises(DataError, match=f"has format version {FORMAT_VERSION - 1}"):
        check_resume(saved, config(), data(latents))


def test_data_sets_in_another_order_are_told_as_that(tmp_path, latents, manifest, make_latents):
    other = make_latents(tmp_path / "other", manifest.fingerprint, seed=1)
    store, before = open_store(str(tmp_path / "run")), data(latents, other)
    run = json.dumps({"format_version": FORMAT_VERSION}).encode()
    texts = {CONFIG: runfile.dump(config()).encode(), **files(before, before.mean, before.std), RUN: run}
    for name, text in texts.items():
        store.write(f"step-00000001/{name}", text)
    two = Checkpoint(store, "step-00000001", {name: noted(text) for name, text in texts.items()})
    with pytest.raises(DataError, match="the data sets stand in another order"):
        check_resume(two, config(), data(other, latents))


def test_weights_to_begin_with_are_told_with_the_scale_of_their_latents():
    before = config(objective={"kind": "ddpm"}).model_dump(mode="json")
    assert what_was_learned(before, config()) == "ddpm epsilon"
    scaled = config(normalisation="scaling_factor")
    assert what_was_learned(before, scaled) == "ddpm epsilon of latents with normalisation=whiten, not scaling_factor"
    assert what_was_learned({"objective": {"kind": "edm"}}, config()) == "edm"
    assert what_was_learned({}, config()) == "an unknown objective"


def check_two(latents: str, first: TrainConfig, second: TrainConfig) -> None:
    """What the second of two ranks finds."""
    told: list[dict[str, object]] = []

    def differing(values: dict[str, object]) -> list[str]:
        told.append(values)
        return [name for name in values if repr(values[name]) != repr(told[0][name])]

    for one in (first, second):
        check_alike(one, data(latents), SimpleNamespace(differing=differing))


def elsewhere(machine: str, sha256: str = "1" * 64, **changes) -> TrainConfig:
    tower = {"name": "clip", "model": f"/{machine}/clip", "pretrained": "", "sha256": sha256}
    text = {"mode": "cached", "context_length": 8, "towers": [tower]}
    pictures = {"every": 10, "prompts": ["a cat"], "autoencoder": f"/{machine}/vae", **changes}
    return config(text=text, validation=pictures)


def test_models_may_lie_elsewhere_on_each_machine_but_are_the_same(latents):
    check_two(latents, elsewhere("a"), elsewhere("b"))
    with pytest.raises(ConfigError, match="the ranks have different run files: text\n"):
        check_two(latents, elsewhere("a"), elsewhere("b", sha256="2" * 64))
    with pytest.raises(ConfigError, match="the ranks have different run files: validation\n"):
        check_two(latents, elsewhere("a"), elsewhere("b", prompts=["a dog"]))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"sha256": "1" * 64}, ""),
        ({"name": "other"}, "text.towers: other, but the latents' captions are for clip"),
        (
            {"sha256": "2" * 64, "layer": "penultimate", "final_norm": False, "pad": "end", "pooled": True},
            "tokenizer, weights, layer, final_norm, pooled_width differ",
        ),
    ],
)
def test_towers_that_a_cached_run_only_names_are_those_of_its_captions(manifest, monkeypatch, named, said):
    digest = digest_of(Tokenizer(8).fingerprint())
    stored = Tower(name="clip", tokenizer=digest, context_length=8, weights="1" * 64, layer="last", width=4)
    mark = manifest.fingerprint.model_copy(update={"text_mode": "cached", "text_towers": (stored,)})
    cached = manifest.model_copy(update={"fingerprint": mark})
    monkeypatch.setattr(start, "open_datasets", lambda *_, **__: SimpleNamespace(manifests=(cached,)))
    now = config(text={"mode": "cached", "context_length": 8, "towers": [{"model": "m", **named}]})
    if not said:
        start.open_data(now)
        return
    with pytest.raises(ConfigError) as error:
        start.open_data(now)
    assert error.value.message.startswith("text.towers: ")
    assert error.value.message.endswith(said)
