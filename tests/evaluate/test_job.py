"""What `lathe evaluate` refuses before it makes a picture."""

from __future__ import annotations

import pytest
from support import fingerprint

from pipeline.config import EvaluateConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from pipeline.evaluate.job import _check_data

FINGERPRINT = fingerprint()


def manifest(**changes) -> Manifest:
    return Manifest.model_construct(fingerprint=FINGERPRINT.model_copy(update=changes))


CONFIG = EvaluateConfig(run="r", autoencoder="a", manifest="m.json", shards="s", output="o")


def test_what_fits_passes():
    _check_data(CONFIG, manifest(), manifest())


def test_other_latents_than_the_runs_are_named():
    with pytest.raises(DataError, match=r"m\.json.*differ in autoencoder_weights, holdout"):
        _check_data(CONFIG, manifest(), manifest(autoencoder_weights="x", holdout=0.2))
