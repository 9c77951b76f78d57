"""How far a worker has come, as the decision about another start sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import runfile
from pipeline.config import EncodeConfig
from pipeline.encode import attempts
from pipeline.errors import ConfigError
from pipeline.storage import open_store

SHARDS = 7
AWAY = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "LATHE_STORAGE_RETRY_SECONDS": "0",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncodeConfig:
    """A job of seven image shards, of which this is the second of three tasks."""
    (tmp_path / "images").mkdir()
    for shard in range(SHARDS):
        (tmp_path / "images" / f"{shard}.tar").touch()
    for name, value in {"ID": 1, "COUNT": 3, "MIN": 0, "MAX": 2, "STEP": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    images = {"shards": str(tmp_path / "images"), "resolution": 64}
    config = EncodeConfig(images=images, autoencoder="vae", output=str(tmp_path / "latents"))
    (tmp_path / "run.yaml").write_text(runfile.dump(config))
    return config


def progress(tmp_path: Path, *overrides: str) -> int | None:
    return attempts.outcome(str(tmp_path / "run.yaml"), list(overrides), tmp_path / "record")[1]


def test_progress_is_that_of_the_own_share(tmp_path, config):
    store = open_store(config.output)
    assert progress(tmp_path) == -1
    for shard, done in {0: -1, 1: 1, 2: 1, 4: 2, 5: 2}.items():
        store.write(f"{shard}.tar.receipt.json", b"{}")
        assert progress(tmp_path) == done


def test_every_resolution_counts(tmp_path, config):
    for side in (32, 64):
        open_store(f"{config.output}/{side}").write("1.tar.receipt.json", b"{}")
    assert progress(tmp_path, "images.resolution=[32, 64]") == 2


def test_storage_that_is_away_does_not_tell(tmp_path, config, monkeypatch):
    for name, value in AWAY.items():
        monkeypatch.setenv(name, value)
    assert progress(tmp_path, "output=s3://bucket/latents") is None


def test_a_share_that_is_none(tmp_path, config, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    with pytest.raises(ConfigError, match="array with gaps"):
        progress(tmp_path)


def test_the_record_is_not_in_the_data_set(tmp_path, config):
    *_, notes = attempts.outcome(str(tmp_path / "run.yaml"), [], tmp_path / "record.json")
    notes.write(notes.read())
    assert (tmp_path / "record.json").exists()
    assert not (tmp_path / "latents").exists()
