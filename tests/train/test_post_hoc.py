"""`lathe ema` on snapshots of weights whose whole way is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from pipeline import runfile
from pipeline.config import EMAConfig, TrainConfig
from pipeline.errors import ConfigError, DataError, LatheError
from pipeline.storage import Store, open_store
from pipeline.train import checkpoint
from pipeline.train.checkpoint import COMPLETE, CONFIG, DamagedError
from pipeline.train.ema_profiles import fit, power_decay
from pipeline.train.post_hoc import MADE, reconstruct, refuse_useless
from pipeline.train.snapshots import due, snapshot_store

STEPS, EVERY = 1000, 25
EMA = EMAConfig.model_validate(
    {
        "averages": [
            {"name": "main", "decay": 0.9},
            {"name": "short", "sigma_rel": 0.05},
            {"name": "long", "sigma_rel": 0.1},
        ],
        "snapshot_every": EVERY,
    }
)
SHAPES = {"conv.weight": (3, 2), "conv.bias": (5,), "scale": ()}


def trajectory() -> dict[str, np.ndarray]:
    """The weights after each step [T, ...]: a way to 1 with noise."""
    rng, way = np.random.default_rng(0), 1.0 - np.exp(-4.0 * np.arange(1, STEPS + 1) / STEPS)
    return {
        name: way.reshape(-1, *(1,) * len(shape)) + 0.05 * rng.standard_normal((STEPS, *shape))
        for name, shape in SHAPES.items()
    }


def average(weights: np.ndarray, sigma_rel: float) -> np.ndarray:
    """By brute force, after each of the steps [T, ...]."""
    found, mean = [], np.zeros(weights.shape[1:])
    for step, now in enumerate(weights, start=1):
        mean = mean + (1.0 - power_decay(step, sigma_rel)) * (now - mean)
        found.append(mean)
    return np.array(found)


@pytest.fixture(scope="module")
def truth() -> dict[float, dict[str, np.ndarray]]:
    way = trajectory()
    return {sigma: {n: average(w, sigma) for n, w in way.items()} for sigma in (0.03, 0.05, 0.07, 0.1, 0.15)}


@pytest.fixture(scope="module")
def run(truth, tmp_path_factory) -> str:
    """A run's output as a training leaves it: a checkpoint, and 40 snapshots by one to three ranks."""
    output = str(tmp_path_factory.mktemp("post-hoc") / "run")
    store = open_store(output)
    config = TrainConfig(manifest="m", output=output, steps=STEPS, ema=EMA)
    texts = {CONFIG: runfile.dump(config).encode(), "latents.json": b"{}", "manifest.json": b"[]"}
    frozen = {"table": torch.arange(3.0)}
    for step in range(EVERY, STEPS + 1, EVERY):
        contents = {
            f"ema.{name}": {n: torch.tensor(w[step - 1], dtype=torch.float32) for n, w in truth[sigma].items()}
            for name, sigma in (("short", 0.05), ("long", 0.1))
        }
        cuts = [[], [4], [2, 9]][step // EVERY % 3]
        write_checkpoint(snapshot_store(store), step, contents, cuts=cuts, frozen=frozen, texts=texts)
    write_checkpoint(store, STEPS, {"weight": contents["ema.short"]}, texts=texts)
    return output


def off(store: Store, expected: dict[str, np.ndarray], step: int) -> float:
    """Largest difference of the weights that `lathe sample` would load."""
    name = checkpoint.latest(store)
    assert name == checkpoint.step_name(step)
    found = checkpoint.load_weights(store, name)
    assert torch.equal(found.pop("table"), torch.arange(3.0))
    assert {n: tuple(w.shape) for n, w in found.items()} == SHAPES
    return max(float(np.abs(w.double().numpy() - expected[n][step - 1]).max()) for n, w in found.items())


@pytest.mark.parametrize(("sigma_rel", "bound"), [(0.03, 3e-3), (0.05, 1e-7), (0.07, 2e-4), (0.1, 1e-7), (0.15, 2e-4)])
@pytest.mark.parametrize("at", [None, 600])
def test_the_average_that_a_training_would_have_made(run, truth, tmp_path, sigma_rel, bound, at):
    result = reconstruct(run, sigma_rel, str(tmp_path / "made"), at)
    assert result.step == (at or STEPS)
    assert off(open_store(str(tmp_path / "made")), truth[sigma_rel], result.step) < bound
    assert result.error < 0.05


def test_a_stored_average_is_read_from_its_own_snapshot_alone(run, tmp_path):
    told: list[tuple[int, int]] = []
    result = reconstruct(run, 0.1, str(tmp_path), 500, lambda *done: told.append(done))
    assert result.snapshots == 1
    assert told == [(1, 1)]
    assert str(result).startswith("the average of length 0.1 at step 500 from 1 snapshots, its profile matched to ")


def test_what_is_made_says_what_it_is_and_is_replaced_by_the_next(run, truth, tmp_path):
    store = open_store(str(tmp_path))
    reconstruct(run, 0.07, store.url)
    reconstruct(run, 0.15, store.url, 750)
    (found,) = checkpoint.find(store)
    assert found.step == 750
    assert off(store, truth[0.15], 750) < 2e-4
    assert found.run()["keys"] == ["ema.post_hoc"]
    assert json.loads(found.read(MADE))["sigma_rel"] == 0.15
    assert found.read(CONFIG) == checkpoint.find(snapshot_store(open_store(run)))[0].read(CONFIG)
    with pytest.raises(DataError, match="use one of: post_hoc"):
        checkpoint.load_weights(store, found.name, "raw")


def test_a_length_that_the_snapshots_are_too_far_apart_for_is_told(run, tmp_path):
    assert "is a poor match" in str(reconstruct(run, 0.01, str(tmp_path / "poor")))
    assert "is a poor match" not in str(reconstruct(run, 0.05, str(tmp_path / "good")))


@pytest.mark.parametrize(
    ("sigma_rel", "said"),
    [
        (0.0, "0 is no share of the training"),
        (-0.1, "-0.1 is no share"),
        (float("nan"), "nan is no share"),
        (0.29, "0.29 is above 0.2886"),
        (float("inf"), "inf is above 0.2886"),
        (1e-200, "1e-200 is below 0.001"),
        (0.00099, "0.00099 is below 0.001"),
    ],
)
def test_lengths_that_no_profile_has(run, tmp_path, sigma_rel, said):
    with pytest.raises(ConfigError, match=f"--sigma-rel {said}"):
        reconstruct(run, sigma_rel, str(tmp_path))


@pytest.mark.parametrize("at", [None, 50])
def test_what_the_snapshots_cannot_make_is_refused_and_what_was_made_stays(run, tmp_path, at):
    store = open_store(str(tmp_path))
    reconstruct(run, 0.07, store.url)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    wanted = 0.002 if at is None else 0.28
    said = (
        rf"--sigma-rel {wanted:g} cannot be made of \d+ snapshots of length 0\.05 and 0\.1: .* matched to 0\.\d+ \(at"
    )
    with pytest.raises(ConfigError, match=said):
        reconstruct(run, wanted, store.url, at)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_coefficients_that_magnify_rounding_are_refused():
    """Of two lengths that are almost the same."""
    steps, lengths = np.repeat(np.arange(25.0, STEPS + 1, 25.0), 2), np.tile([0.1, 0.1001], 40)
    found = fit(steps, lengths, STEPS, 0.07)
    assert found.error < 0.01
    with pytest.raises(ConfigError, match=r"by coefficients of \S+ in all \(at most 300\)"):
        refuse_useless(found, 0.07, [0.1, 0.1001], 40)


@pytest.mark.parametrize("damage", ["run.json", COMPLETE, MADE, "rank-00000-of-00001.safetensors"])
def test_what_was_made_before_and_is_damaged_is_replaced_too(run, truth, tmp_path, damage):
    store = open_store(str(tmp_path))
    reconstruct(run, 0.07, store.url)
    (tmp_path / checkpoint.step_name(STEPS) / damage).write_bytes(b"{")
    reconstruct(run, 0.15, store.url, 750)
    assert [one.step for one in checkpoint.find(store)] == [750]
    assert not list((tmp_path / checkpoint.step_name(STEPS)).glob("*"))
    assert off(store, truth[0.15], 750) < 2e-4


@pytest.mark.parametrize(
    ("at", "said", "remedy"),
    [
        (STEPS + 1, "no snapshot of step 1001; they reach from step 25 to step 1000", "give --at 975 or --at 1000"),
        (610, "no snapshot of step 610", "give --at 600 or --at 625"),
        (1, "no snapshot of step 1", "give --at 25 or --at 50"),
    ],
)
def test_a_step_without_a_snapshot(run, tmp_path, at, said, remedy):
    with pytest.raises(DataError, match=said) as error:
        reconstruct(run, 0.05, str(tmp_path), at)
    assert error.value.remedy == remedy


def test_a_run_without_snapshots(run, tmp_path):
    for empty in (str(tmp_path / "nothing"), f"{run}/{checkpoint.step_name(STEPS)}"):
        with pytest.raises(DataError, match="holds no snapshots of averages"):
            reconstruct(empty, 0.05, str(tmp_path / "made"))


@pytest.mark.parametrize("where", ["", "/ema"])
def test_a_training_is_not_overwritten(run, where):
    before = {file: file.stat().st_mtime_ns for file in Path(run).rglob("*")}
    with pytest.raises(ConfigError, match="holds checkpoints of a training"):
        reconstruct(run, 0.05, run + where)
    assert {file: file.stat().st_mtime_ns for file in Path(run).rglob("*")} == before


def test_a_damaged_snapshot_is_named_and_nothing_is_written(run, tmp_path):
    for file in Path(run).rglob("*"):
        if file.is_file():
            copy = tmp_path / "run" / file.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    damaged = tmp_path / "run" / "ema" / checkpoint.step_name(975) / "rank-00000-of-00001.safetensors"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"step-00000975/rank-00000-of-00001\.safetensors is damaged"):
        reconstruct(str(tmp_path / "run"), 0.07, str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


def test_snapshots_of_another_model(run, tmp_path):
    store = snapshot_store(open_store(str(tmp_path)))
    texts = {CONFIG: runfile.dump(TrainConfig(manifest="m", output="o", ema=EMA)).encode()}
    for step, size in ((180, 3), (200, 4)):
        write_checkpoint(store, step, {"ema.long": {"w": torch.ones(size)}}, texts=texts)
    with pytest.raises(LatheError, match="step-00000180 is of another model than step-00000200"):
        reconstruct(str(tmp_path), 0.11, str(tmp_path / "made"))


def test_when_a_snapshot_is_due():
    config = TrainConfig(manifest="m", output="o", steps=110, ema=EMA)
    assert [step for step in range(1, 111) if due(config, step)] == [25, 50, 75, 100, 110]
    never = config.model_copy(update={"ema": EMAConfig()})
    assert not any(due(never, step) for step in range(1, 111))
