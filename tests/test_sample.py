"""What `lathe sample` says of its pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import sample as job
from pipeline.config import SampleConfig


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({}, "weights main, euler in 25 steps, guidance 2"),
        ({"weights": "raw", "sampler": "dpm++", "steps": 12, "guidance": 3.5}, "weights raw, dpm++ in 12 steps,"),
        ({"sampler": "ode", "guidance": 1}, "weights main, ode, guidance 1"),
    ],
)
def test_the_summary_tells_weights_and_sampler(
    fields: dict, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(1, 1)

    def load(run: str, which: str, towers: tuple[()]) -> SimpleNamespace:
        parts = {"model": model, "load_autoencoder": lambda url: model, "mean": None, "std": None, "prompts": None}
        return SimpleNamespace(step=7, weights=which or "main", objective=None, **parts)

    monkeypatch.setattr(job, "load_trained", load)
    monkeypatch.setattr(job, "generate", lambda *args, **how: (None, np.zeros((1, 8, 8, 3), np.uint8)))
    config = SampleConfig(run="r", autoencoder="a", prompts=("red heart",), output=str(tmp_path), **fields)
    said = str(job.sample(config))
    assert said.startswith(f"1 pictures from step 7 ({how}")
    assert (tmp_path / "0000-red-heart.png").exists()
