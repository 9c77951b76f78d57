"""Run file, latents and checkpoint that do not fit together are refused by name."""

from __future__ import annotations

import pytest

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.errors import ConfigError, DataError
from pipeline.storage import open_store
from pipeline.train.checkpoint import CONFIG, MANIFEST, Checkpoint, noted
from pipeline.train.compatibility import check_data, check_resume


def config(**changes) -> TrainConfig:
    return TrainConfig.model_validate(
        {"manifest": "m", "output": "o", "text": {"context_length": 8}, "global_batch": 8, **changes}
    )


@pytest.fixture
def manifest(latents) -> Manifest:
    return load_manifest(latents)


@pytest.fixture
def saved(tmp_path, manifest) -> Checkpoint:
    store = open_store(str(tmp_path / "run"))
    texts = {CONFIG: runfile.dump(config()).encode(), MANIFEST: manifest.to_bytes()}
    for name, data in texts.items():
        store.write(f"step-00000001/{name}", data)
    return Checkpoint(store, "step-00000001", {name: noted(data) for name, data in texts.items()})


def test_what_fits_passes(manifest, saved):
    check_data(config(), manifest)
    check_resume(saved, config(steps=9, optimizer={"learning_rate": 1.0}, engine={"zero_stage": 1}), manifest)


def test_context_length_of_another_encoding(manifest):
    with pytest.raises(ConfigError, match=r"text\.context_length: 16.*8 tokens"):
        check_data(config(text={"context_length": 16}), manifest)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_captions_that_are_no_token_ids_for_a_tower_in_training(manifest, mode):
    other = manifest.model_copy(update={"fingerprint": manifest.fingerprint.model_copy(update={"text_mode": mode})})
    with pytest.raises(ConfigError, match=rf"^text\.mode: joint, .* text\.mode={mode}\n.*text\.mode=joint"):
        check_data(config(), other)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"text_padding": "trimmed"}, ConfigError, r"^text\.padding: .* trimmed"),
        ({"buckets": ((16, 64), (32, 32))}, DataError, r"several shapes.*\n.*images\.buckets"),
    ],
)
def test_what_the_trainer_cannot_read_yet(manifest, changes, kind, message):
    other = manifest.model_copy(update={"fingerprint": manifest.fingerprint.model_copy(update=changes)})
    with pytest.raises(kind, match=message) as error:
        check_data(config(), other)
    assert "\n" not in error.value.message


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
        ({"global_batch": 16}, "global_batch: 16.*8"),
        ({"shuffle_window": 1}, "shuffle_window: 1.*256"),
    ],
)
def test_a_field_that_a_run_keeps(manifest, saved, changes, field):
    with pytest.raises(ConfigError, match=field):
        check_resume(saved, config(**changes), manifest)


def test_latents_of_another_meaning(tmp_path, saved, manifest, make_latents):
    other = manifest.fingerprint.model_copy(update={"autoencoder_weights": "other", "resize_filter": "box"})
    url = make_latents(tmp_path / "other", other)
    with pytest.raises(DataError, match="differ in autoencoder_weights, resize_filter"):
        check_resume(saved, config(), load_manifest(url))


def test_a_checkpoint_of_an_older_format(saved, manifest):
    data = manifest.model_copy(update={"format_version": 1}).to_bytes()
    saved.store.write(f"step-00000001/{MANIFEST}", data)
    saved.files[MANIFEST] = noted(data)
    with pytest.raises(DataError, match=r"step-00000001/manifest\.json has format version 1"):
        check_resume(saved, config(), manifest)


def test_other_shards_of_the_same_meaning(tmp_path, saved, manifest, make_latents):
    url = make_latents(tmp_path / "other", manifest.fingerprint, seed=1)
    with pytest.raises(DataError, match="content_hash"):
        check_resume(saved, config(), load_manifest(url))
