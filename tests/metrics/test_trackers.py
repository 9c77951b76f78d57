"""TensorBoard by its own reader; Weights & Biases by a stand-in with its interface, which is no dependency."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config import TrackedMetricsConfig, WandbConfig
from pipeline.data.images import contact_sheet
from pipeline.errors import ConfigError, SetupError
from pipeline.metrics import Metrics, Place, read_log
from pipeline.metrics.trackers import WANDB_ID
from pipeline.storage import open_store

PICTURES = np.zeros((2, 8, 16, 3), np.uint8)
WANDB = WandbConfig(project="lathe", tags=("a", "b"))


def made(folder, rank=0, **config) -> Metrics:
    settings = TrackedMetricsConfig(prometheus=False, **config)
    return Metrics(settings, "train", Place(number=rank), log_store=open_store(str(folder)), about={"steps": 9})


def log(metrics: Metrics, *steps: int) -> None:
    for step in steps:
        metrics.log(step, {"loss": 1 / step, "validation_loss": {"main": step, "raw": float("nan")}})


def show(metrics: Metrics, step: int) -> None:
    sheet = contact_sheet(PICTURES, 2, ["x", "y"])
    metrics.show(step, "samples", sheet=sheet, pictures=PICTURES, captions=["x", "y"])


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        metrics = made(tmp_path, tensorboard=True)
        metrics.resume(resumed_at)
        log(metrics, *steps)
        show(metrics, steps[-1])
        metrics.flush()  # and is killed
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss", "validation_loss/main", "validation_loss/raw"]
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([1 / step for step in range(1, 6)])
    assert [event.step for event in found.Images("samples")] == [5]
    assert (found.Images("samples")[0].width, found.Images("samples")[0].height) == (44, 30)
    lines = read_log(open_store(str(tmp_path)))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["validation_loss"] == {"main": 1, "raw": None}


def test_a_tracker_that_fails_is_told_of_once_and_the_log_goes_on(tmp_path, monkeypatch, capfd):
    metrics = made(tmp_path / "run", tensorboard=str(tmp_path / "board"))
    metrics.resume(0)
    log(metrics, 1)
    (tracker,) = metrics._trackers._open
    tracker._file = tracker._records._writer = open("/dev/full", "wb")  # noqa: PTH123, SIM115
    log(metrics, 2)
    show(metrics, 2)
    metrics.close()
    assert capfd.readouterr().err == (
        "TensorBoard is told nothing more: [Errno 28] No space left on device; training goes on\n"
    )
    assert len(read_log(open_store(str(tmp_path / "run")))) == 2


def test_other_ranks_tell_no_tracker(tmp_path):
    metrics = made(tmp_path, rank=1, tensorboard=True, wandb=WANDB)
    metrics.resume(0)
    log(metrics, 1)
    show(metrics, 1)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_needs_a_folder():
    with pytest.raises(ConfigError, match=r"metrics\.tensorboard: its files would lie in s3://bucket/run/tensorboard"):
        Metrics(TrackedMetricsConfig(tensorboard=True), "train", log_store=SimpleNamespace(url="s3://bucket/run"))


def test_wandb_is_asked_for_and_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("pipeline.metrics.trackers.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"metrics\.wandb: set, but wandb is not installed") as told:
        made(tmp_path, wandb=WANDB)
    assert "pip install wandb, or set metrics.wandb=null" in str(told.value)


def test_wandb_has_one_run_for_an_output_however_often_it_starts(tmp_path, monkeypatch):
    calls = []

    def init(**arguments):
        calls.append(("init", arguments))
        run = SimpleNamespace(log=lambda values, step: calls.append((step, values)))
        run.finish = lambda: calls.append(("finish", {}))
        return run

    fake = SimpleNamespace(init=init, Image=lambda picture, caption: (picture.shape, caption))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("pipeline.metrics.trackers.find_spec", lambda name: fake)
    for resumed_at in (0, 1):
        metrics = made(tmp_path, wandb=WANDB)
        metrics.resume(resumed_at)
        log(metrics, resumed_at + 1)
        show(metrics, resumed_at + 1)
        metrics.close()
    first, again = (arguments for what, arguments in calls if what == "init")
    assert first == again
    assert first["id"] == (tmp_path / WANDB_ID).read_text()
    assert {name: first[name] for name in ("project", "tags", "mode", "resume", "dir", "config")} == {
        "project": "lathe",
        "tags": ["a", "b"],
        "mode": "online",
        "resume": "allow",
        "dir": str(tmp_path),
        "config": {"steps": 9},
    }
    assert [what for what, _ in calls] == ["init", 1, 1, "finish", "init", 2, 2, "finish"]
    assert calls[1][1]["validation_loss/main"] == 1
    assert calls[2][1] == {"samples": [((8, 16, 3), "x"), ((8, 16, 3), "y")]}
