"""A healthy training run and encode job, in which tests plant faults."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latent_set import build, encode_settings, save_autoencoder, write_pictures
from training_run import SMALL

from pipeline import runfile
from pipeline.config import TrainConfig
from pipeline.operate.doctor.finding import Finding
from pipeline.operate.doctor.job import examine_run

Examine = Callable[..., dict[str, Finding]]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in `images`, their autoencoder `vae`, another one, and `latents`. Tests change nothing here."""
    folder = tmp_path_factory.mktemp("doctor")
    write_pictures(folder / "images")
    save_autoencoder(folder / "vae")
    save_autoencoder(folder / "other-vae", seed=1)
    build(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "NODES", "NPROC", "MASTER_ADDR", "MASTER_PORT", "LATHE_REQUEUE_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.endswith("_SOCKET_IFNAME")]:
        monkeypatch.delenv(name)


def settings(manifest: str, output: str, **changes: Any) -> dict[str, Any]:
    return {"manifest": manifest, "output": output, **SMALL, **changes}


@pytest.fixture
def train_file(place: Path, tmp_path: Path) -> Path:
    """The run file of a healthy training."""
    file = tmp_path / "train.yaml"
    tree = settings(str(place / "latents/manifest.json"), str(tmp_path / "run"))
    file.write_text(runfile.dump(TrainConfig.model_validate(tree)))
    return file


@pytest.fixture
def encode_file(place: Path, tmp_path: Path) -> Path:
    """The run file of a healthy encode job."""
    file = tmp_path / "encode.yaml"
    file.write_text(runfile.dump(encode_settings(place, tmp_path / "encoded")))
    return file


@pytest.fixture
def training(train_file: Path) -> Examine:
    """Examine the training, with fields changed."""
    return lambda *changes, **options: by_name(examine_run(str(train_file), changes, **options))


@pytest.fixture
def encoding(encode_file: Path) -> Examine:
    """Examine the encode job, with fields changed."""
    return lambda *changes, **options: by_name(examine_run(str(encode_file), changes, **options))


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    named = {finding.check: finding for finding in findings}
    assert len(named) == len(findings)
    return named
