"""What `lathe evaluate` refuses before it makes a picture, and what it says of its scores."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import fingerprint

from pipeline.config import EvaluateConfig
from pipeline.data.manifest import Manifest
from pipeline.data.split_arrays import SplitArrays
from pipeline.errors import DataError
from pipeline.evaluate import job
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


def test_the_scores_lie_beside_what_they_are_of(tmp_path, monkeypatch):
    moments = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float16)
    splits = {
        "train": SplitArrays(moments, ["a", "b", "c"], ["x", "y", "z"]),
        "holdout": SplitArrays(moments[:0], [], []),
    }
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    model = torch.nn.Linear(1, 1)
    trained = SimpleNamespace(
        step=7,
        weights="long",
        model=model,
        load_autoencoder=lambda url: model,
        mean=torch.zeros(1),
        std=torch.ones(1),
        prompts=None,
        objective=None,
        manifest=SimpleNamespace(latent_channels=1, fingerprint=FINGERPRINT),
    )
    monkeypatch.setattr(job, "load_trained", lambda run, which, towers: trained)
    monkeypatch.setattr(job, "load_manifest", lambda url: trained.manifest)
    monkeypatch.setattr(job, "read_split", lambda url, split, limit=None: splits[split])
    monkeypatch.setattr(job, "_originals", lambda shards, encoded, keys: dict.fromkeys(keys, pictures[0]))
    monkeypatch.setattr(job, "_reconstructions", lambda *of_nothing: pictures[:0])
    monkeypatch.setattr(job, "generate", lambda *args, **how: (torch.zeros(2, 1, 4, 4), pictures))
    fields = {"prompts": 2, "sampler": "heun", "steps": 9, "guidance": 1.5, "output": str(tmp_path)}
    result = job.evaluate(CONFIG.model_copy(update=fields))
    assert str(result).startswith("step 7 (weights long, heun in 9 steps, guidance 1.5), 2 prompts: ")
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["how"] == {"weights": "long", "sampler": "heun", "steps": 9, "guidance": 1.5}
    assert job.read_evaluation(tmp_path)[0] == result
