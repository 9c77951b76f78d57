"""What `lathe evaluate` refuses before it makes a picture."""

from __future__ import annotations

import pytest

from pipeline.config import EvaluateConfig
from pipeline.data.manifest import Fingerprint, Manifest
from pipeline.errors import ConfigError, DataError
from pipeline.evaluate.job import _check_data

FINGERPRINT = Fingerprint(
    autoencoder_weights="a",
    autoencoder_config="b",
    normalisation="c",
    resize_filter="lanczos",
    crop_rule="centre",
    resolution=64,
    background=(255, 255, 255),
    text_mode="joint",
    tokenizer="d",
    context_length=8,
    text_padding="full",
    caption_field="caption",
    dtype="float16",
    holdout=0.1,
)


def manifest(**changes) -> Manifest:
    return Manifest.model_construct(fingerprint=FINGERPRINT.model_copy(update=changes))


def config(**images) -> EvaluateConfig:
    pictures = {"shards": "s", "resolution": 64, **images}
    return EvaluateConfig(run="r", autoencoder="a", manifest="m.json", images=pictures, output="o")


def test_what_fits_passes():
    _check_data(config(), manifest(), manifest())


def test_other_latents_than_the_runs_are_named():
    with pytest.raises(DataError, match=r"m\.json.*differ in autoencoder_weights, holdout"):
        _check_data(config(), manifest(), manifest(autoencoder_weights="x", holdout=0.2))


@pytest.mark.parametrize("images", [{"resolution": 32}, {"background": (0, 0, 0)}, {"caption_field": "text"}])
def test_pictures_unlike_the_encoded_ones_are_named(images):
    with pytest.raises(ConfigError, match=rf"images\.{next(iter(images))}: "):
        _check_data(config(**images), manifest(), manifest())
