"""E1: workers killed at random instants and restarted in other numbers make the data set of an undisturbed one."""

from __future__ import annotations

import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import numpy as np
import pytest
import small_models

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.tar import TarBuilder
from pipeline.encode.job import encode
from pipeline.storage import Store, open_store

SIDE, SHARDS, PER_SHARD = 96, 4, 40
KILLS, LONG_KILLS = 6, 20
LIMIT_SECONDS = 240.0
PARTS = {"LATHE_S3_PART_MIB": "5"}  # latent shards of 6 MB travel in two parts


def start(config: EncodeConfig, workers: int) -> list[BaseProcess]:
    variables = {**os.environ, **PARTS}
    return [forked.start(encode, config, (i, workers), environment=variables) for i in range(workers)]


def finish(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(LIMIT_SECONDS)
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image shards of noise, and an autoencoder whose latents are large."""
    place = tmp_path_factory.mktemp("killed")
    (place / "images").mkdir()
    for shard in range(SHARDS):
        tar, rng = TarBuilder(), np.random.default_rng(shard)
        for i in range(PER_SHARD):
            shape = [(96, 96), (96, 144), (144, 96)][i % 3]
            tar.add(f"{shard:03d}{i:03d}.png", images.png(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)))
            tar.add(f"{shard:03d}{i:03d}.txt", f"picture {i}".encode())
        tar.add("bad.jpg", b"<html>")
        tar.add("bad.txt", b"x")
        (place / "images" / f"{shard}.tar").write_bytes(tar.finish())
    small_models.autoencoder_of_large_latents().save_pretrained(place / "vae")
    return place


def settings(place: Path, output: str) -> EncodeConfig:
    shards = {"shards": str(place / "images"), "resolution": SIDE, "buckets": {"step": 16}, "holdout": 0.1}
    return EncodeConfig(
        images=shards,
        autoencoder=str(place / "vae"),
        output=output,
        batch_size=8,
        max_reject_rate=0.5,
        threads=1,
        metrics={"prometheus": False},
    )


def content(store: Store) -> dict[str, bytes]:
    return {entry.name: store.read(entry.name) for entry in store.list()}


def prove(place: Path, outputs: str, kills: int) -> None:
    """Kill until `kills` blows have hit a worker at work, on one output after another."""
    seed = int(os.environ.get("LATHE_TEST_SEED", time.time_ns() % 2**32))
    print(f"seed {seed}: LATHE_TEST_SEED={seed} repeats these instants")  # noqa: T201
    chance = random.Random(seed)
    finish(start(settings(place, f"{outputs}/undisturbed"), 1))
    begun = time.monotonic()
    finish(start(settings(place, f"{outputs}/again"), 1))
    seconds = time.monotonic() - begun
    expected = content(open_store(f"{outputs}/undisturbed"))
    assert content(open_store(f"{outputs}/again")) == expected
    hits = output = 0
    while hits < kills:
        output += 1
        config = settings(place, f"{outputs}/killed-{output}")
        for _ in range(chance.randint(1, 4)):
            processes = start(config, chance.randint(1, 3))
            time.sleep(chance.uniform(0.1, 1.0) * seconds)
            for process in processes:
                hits += process.is_alive()
                process.kill()
                process.join()
        finish(start(config, chance.randint(1, 3)))
        store = open_store(config.output)
        found = content(store)
        assert sorted(found) == sorted(expected)
        assert [name for name in found if found[name] != expected[name]] == []
        assert store.leftovers() == ()


@pytest.mark.ranks
def test_killed_workers_lose_and_double_nothing_on_s3(place: Path, s3_url: str) -> None:
    prove(place, s3_url, KILLS)


@pytest.mark.ranks
def test_killed_workers_lose_and_double_nothing_in_a_folder(place: Path, tmp_path: Path) -> None:
    prove(place, str(tmp_path), KILLS // 2)


@pytest.mark.long
def test_twenty_killed_workers_lose_and_double_nothing(place: Path, s3_url: str, tmp_path: Path) -> None:
    prove(place, s3_url, LONG_KILLS)
    prove(place, str(tmp_path), LONG_KILLS)
