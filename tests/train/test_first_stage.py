from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import FirstStageConfig
from pipeline.data.images import png
from pipeline.errors import ConfigError, DataError
from pipeline.metrics import Metrics, read_log
from pipeline.models import autoencoder
from pipeline.storage import open_store
from pipeline.train import first_stage, first_stage_checkpoint
from pipeline.train.first_stage import fit_first_stage
from pipeline.train.first_stage_checkpoint import restore
from pipeline.train.first_stage_step import batch_indices


def write_shard(path: Path, count: int = 24) -> None:
    """Coloured rectangles on white."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            pixels = np.full((16, 16, 3), 255, np.uint8)
            top, left = draw.integers(0, 8, 2)
            pixels[top : top + 8, left : left + 8] = draw.integers(0, 256, 3)
            for suffix, content in ((".png", png(pixels)), (".txt", b"a box")):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "0.tar")
    return {
        "images": {"shards": str(tmp_path / "shards"), "resolution": 16, "holdout": 0.25},
        "output": str(tmp_path / "vae"),
        "model": {"latent_channels": 4, "block_out_channels": [8, 16], "norm_num_groups": 4},
        "steps": 8,
        "batch_size": 4,
        "optimizer": {"warmup_steps": 2},
        "threads": 1,
        "checkpoint": {"every": 3, "keep": 1},
        "metrics": {"prometheus": False},
        "log_every": 2,
    }


def fit(tree: dict[str, Any], **changed: Any) -> dict[str, Any]:
    config = FirstStageConfig.model_validate({**tree, **changed})
    fit_first_stage(config)
    found: dict[str, Any] = json.loads(open_store(config.output).read("first_stage.json"))
    return found


class Killed(Exception):  # noqa: N818  (no error, an event)
    pass


def killed_at(step: int) -> Any:
    def progress(done: int, _total: int, _note: str) -> None:
        if done == step:
            raise Killed

    return progress


def losses(output: str) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in logged(output)]


def logged(output: str) -> list[dict[str, Any]]:
    """The lines of steps."""
    return [line for line in read_log(open_store(output)) if "loss" in line]


def test_it_learns_and_leaves_a_loadable_autoencoder(tree: dict[str, Any]) -> None:
    short = fit(tree, steps=1, output=tree["output"] + "-short")
    facts = fit(tree, steps=50, checkpoint={"every": 1000}, ema_decay=0.9)
    assert facts["psnr_on"] == "held-out pictures"
    assert facts["pictures"] + facts["holdout_pictures"] == 24
    assert facts["psnr_db"] > short["psnr_db"] + 3
    loaded = autoencoder.load(tree["output"])
    assert autoencoder.weights_hash(loaded) == facts["weights_hash"]
    assert not (Path(tree["output"]) / "checkpoints").exists() or restore(open_store(tree["output"])) is None
    assert read_log(open_store(tree["output"]))[-1]["holdout_psnr_db"] == pytest.approx(facts["psnr_db"], rel=1e-8)


def test_the_line_after_a_checkpoint_tells_what_it_took(tree: dict[str, Any]) -> None:
    fit(tree)
    assert [line["step"] for line in logged(tree["output"]) if "checkpoint_seconds" in line] == [4, 8]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_and_resumed_is_bit_equal_to_undisturbed(tree: dict[str, Any], precision: str) -> None:
    tree["precision"] = precision
    undisturbed = fit(tree, output=tree["output"] + "-whole")
    with pytest.raises(Killed):
        fit_first_stage(FirstStageConfig.model_validate(tree), killed_at(5))
    saved = restore(open_store(tree["output"]))
    assert saved is not None
    assert saved.name == "checkpoints/step-00000003"
    resumed = fit(tree)
    assert resumed["weights_hash"] == undisturbed["weights_hash"]
    assert losses(tree["output"]) == losses(tree["output"] + "-whole")


@pytest.mark.parametrize("before", [4, 1])
def test_the_first_mean_after_a_resume_is_of_the_steps_since_the_last_one_logged(
    tree: dict[str, Any], before: int
) -> None:
    """Saved after step 3, gone on with a line every third step."""
    fit(tree, output=tree["output"] + "-whole", log_every=1)
    with pytest.raises(Killed):
        fit_first_stage(FirstStageConfig.model_validate({**tree, "log_every": before}), killed_at(5))
    fit(tree, log_every=5)
    whole = [loss for _, loss, _ in losses(tree["output"] + "-whole")]
    first = 0 if before == 4 else 3
    found = next(loss for step, loss, _ in losses(tree["output"]) if step == 5)
    assert found == pytest.approx(np.mean(whole[first:5]), rel=1e-6)


def test_its_last_step_is_told_whatever_the_log_has_and_a_checkpoint_is_as_old_as_its_state(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float]] = []
    stored: list[float] = []

    def save(*arguments: Any) -> int:
        stored.append(time.time())
        return first_stage_checkpoint.save(*arguments)

    monkeypatch.setattr(first_stage, "checkpoint", SimpleNamespace(**{**vars(first_stage_checkpoint), "save": save}))
    monkeypatch.setattr(Metrics, "set", lambda _, key, value: told.append((key, value)))
    fit(tree, log_every=1000)
    assert [key for key, _ in told].count("last_step_timestamp_seconds") == 8
    ages = [value for key, value in told if key == "checkpoint_timestamp_seconds"]
    assert all(taken <= begun for taken, begun in zip(ages, stored, strict=True))


def test_on_s3_it_resumes_too_and_the_result_loads_from_there(tree: dict[str, Any], s3_url: str) -> None:
    whole = tree["output"] + "-whole"
    undisturbed = fit(tree, output=whole)
    tree["output"] = f"{s3_url}/vae"
    with pytest.raises(Killed):
        fit_first_stage(FirstStageConfig.model_validate(tree), killed_at(5))
    assert fit(tree)["weights_hash"] == undisturbed["weights_hash"]
    assert losses(tree["output"]) == losses(whole)
    assert [entry.name for entry in open_store(tree["output"]).list("checkpoints/")] == []
    assert autoencoder.weights_hash(autoencoder.load(tree["output"])) == undisturbed["weights_hash"]


def test_killed_before_the_marker_only_finishes(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "save", die)
        with pytest.raises(Killed):
            fit(tree)
    assert not (Path(tree["output"]) / "first_stage.json").exists()
    assert fit(tree)["steps"] == 8
    assert sum("holdout_psnr_db" in line for line in read_log(open_store(tree["output"]))) == 1


def test_finished_output_is_not_redone(tree: dict[str, Any]) -> None:
    fit(tree)
    (Path(tree["images"]["shards"]) / "0.tar").unlink()  # would be missed if it were
    message = fit_first_stage(FirstStageConfig.model_validate({**tree, "threads": 2, "log_every": 5}))
    assert "8 steps" in message


def test_finished_output_of_other_settings_is_refused(tree: dict[str, Any]) -> None:
    fit(tree)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps=2, and the run file says 1"):
        fit(tree, optimizer={"warmup_steps": 1})


def test_output_of_before_a_setting_was_there_is_taken_with_its_default(tree: dict[str, Any]) -> None:
    fit(tree)
    marker = Path(tree["output"]) / "first_stage.json"
    facts = json.loads(marker.read_text())
    del facts["settings"]["optimizer"]["schedule"]
    marker.write_text(json.dumps(facts))
    assert fit(tree)["steps"] == 8
    with pytest.raises(ConfigError, match=r"optimizer\.schedule=cosine, and the run file says linear"):
        fit(tree, optimizer={**tree.get("optimizer", {}), "schedule": "linear"})


def test_checkpoints_of_other_settings_or_pictures_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(Killed):
        fit_first_stage(FirstStageConfig.model_validate(tree), killed_at(5))
    with pytest.raises(ConfigError, match="checkpoints of a run with steps=8"):
        fit(tree, steps=9)
    write_shard(Path(tree["images"]["shards"]) / "0.tar", 20)
    with pytest.raises(DataError, match="not those that"):
        fit(tree)


def test_damaged_checkpoint_is_passed_over(tree: dict[str, Any]) -> None:
    tree["checkpoint"] = {"every": 2, "keep": 2}
    undisturbed = fit(tree, output=tree["output"] + "-whole")
    with pytest.raises(Killed):
        fit_first_stage(FirstStageConfig.model_validate(tree), killed_at(5))
    newest = Path(tree["output"]) / "checkpoints" / "step-00000004" / "state.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    saved = restore(open_store(tree["output"]))
    assert saved is not None
    assert saved.facts["step"] == 2
    assert fit(tree)["weights_hash"] == undisturbed["weights_hash"]


def test_broken_loss_stops_the_run(tree: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not finite at step"):
        fit(tree, kernel_learning_rate=1e30)


def test_average_is_the_weights_average(tree: dict[str, Any]) -> None:
    """With decay 0 the average is the last weights; with a decay it is not."""
    last, averaged = (
        fit(tree, ema_decay=decay, output=f"{tree['output']}-{decay}")["weights_hash"] for decay in (0.0, 0.9)
    )
    assert last != averaged


def test_global_random_state_neither_matters_nor_changes(tree: dict[str, Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fit(tree, output=tree["output"] + "-1")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert fit(tree, output=tree["output"] + "-2")["weights_hash"] == one["weights_hash"]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**40))
def test_every_epoch_holds_each_picture_once(size: int, batch: int, seed: int) -> None:
    steps = -(-3 * size // batch)
    seen = np.concatenate([batch_indices(size, batch, seed, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(seen[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
