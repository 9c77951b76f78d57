"""`init_from`: what is told of the weights that a run begins with, and a checkpoint that is deleted meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from one_rank import alone, small_engine
from support import fingerprint

from pipeline import runfile
from pipeline.config import DataSetConfig, TrainConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.manifest import Manifest, Tower, load_manifest
from pipeline.errors import DataError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.storage import open_store
from pipeline.train import checkpoint, initial
from pipeline.train.initial import begin, what_was_other
from pipeline.train.trained_on import files


def config(run: object, **changes: Any) -> TrainConfig:
    begun = {"manifest": "m", "output": "o", "init_from": {"run": str(run)}, "text": {"context_length": 8}}
    return TrainConfig.model_validate({**begun, **changes})


def write(latents: str, folder: Path, step: int) -> None:
    """A checkpoint whose weights are all the step's number."""
    data, engine = open_datasets([DataSetConfig(manifest=latents)], global_batch=8), small_engine(alone())
    weights = {name: torch.full(shape, float(step)) for name, shape in state.shapes(engine).items()}
    texts = {checkpoint.CONFIG: runfile.dump(config("before")).encode(), **files(data, data.mean, data.std)}
    write_checkpoint(open_store(str(folder)), step, {"weight": weights}, frozen=state.frozen(engine), texts=texts)


def told(engine: Engine) -> set[float]:
    return {float(value) for fragment in state.fragments(engine) for value in fragment.tensors[state.WEIGHT].unique()}


@pytest.fixture
def manifest(latents: str) -> Manifest:
    return load_manifest(latents)


@pytest.fixture
def clear_while_it_is_read(monkeypatch, latents):
    """Its run retires the checkpoint of step 4 for that of step 8 before `when` reads it."""

    def arrange(folder: Path, when: str) -> None:
        write(latents, folder, 4)
        module = checkpoint if when == "open_checkpoint" else initial
        original = getattr(module, when)

        def late(*arguments: Any) -> Any:
            if (folder / "step-00000004").exists():
                write(latents, folder, 8)
                checkpoint.clear(open_store(str(folder)), "step-00000004")
            return original(*arguments)

        monkeypatch.setattr(module, when, late)

    return arrange


@pytest.mark.parametrize("when", ["open_checkpoint", "_source", "_fill"])
def test_a_checkpoint_that_its_run_deletes_meanwhile_is_looked_for_again(
    tmp_path, manifest, clear_while_it_is_read, capfd, when
):
    clear_while_it_is_read(tmp_path, when)
    engine = small_engine(alone())
    begun = begin(config(tmp_path), manifest, alone(), engine)
    assert begun == {"checkpoint": f"{tmp_path}/step-00000008", "weights": "raw", "step": 8}
    assert told(engine) == {8.0}
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}/step-00000004 was deleted while it was read")
    assert second.startswith(f"beginning with weights raw of {tmp_path}/step-00000008")


def test_one_that_was_named_is_not_replaced_by_another(tmp_path, manifest, clear_while_it_is_read, capfd):
    clear_while_it_is_read(tmp_path, "_fill")
    named, engine = config(tmp_path / "step-00000004"), small_engine(alone())
    with pytest.raises(DataError, match=r"step-00000004 was deleted while it was read.*\n  start again, or name one"):
        begin(named, manifest, alone(), engine)
    with pytest.raises(DataError, match="step-00000004 is not a complete checkpoint\n  give the run's folder"):
        begin(named, manifest, alone(), engine)
    assert not capfd.readouterr().err


def test_ranks_agree_on_what_is_wrong_before_the_weights(tmp_path, latents, manifest, monkeypatch):
    write(latents, tmp_path, 4)
    file = tmp_path / "step-00000004" / "config.yaml"
    file.write_bytes(file.read_bytes()[::-1])
    ranks, problems = alone(), []

    def agree(problem: Exception | None = None) -> None:
        if problem is not None:
            problems.append(problem)
            raise problem

    monkeypatch.setattr(ranks, "agree", agree)
    with pytest.raises(DataError, match=r"config\.yaml is damaged"):
        begin(config(tmp_path), manifest, ranks, small_engine(ranks))
    assert len(problems) == 1


def seen(**changes: Any) -> Manifest:
    return Manifest.model_construct(fingerprint=fingerprint(**changes))


def clip(**changes: Any) -> tuple[Tower, ...]:
    return (Tower(name="clip", tokenizer="t", context_length=8, **changes),)


def online(sha256: str) -> dict[str, Any]:
    return {"text": {"mode": "online", "context_length": 8, "towers": [{"model": "a", "sha256": sha256}]}}


BOTH = "another autoencoder and other text towers"
CACHED = {"text_mode": "cached", "text_towers": clip(weights="1" * 64, layer="last", width=8)}


@pytest.mark.parametrize(
    ("before", "theirs", "now", "ours", "said"),
    [
        ({}, {}, {}, {}, ""),
        ({}, {}, {}, {"autoencoder_weights": "x"}, "another autoencoder"),
        ({}, {}, {}, {"text_towers": clip(pooled_width=4)}, ""),
        ({}, {}, {}, {"autoencoder_weights": "x", "text_mode": "cached", "text_towers": clip(weights="1")}, BOTH),
        (online("1" * 64), {}, online("1" * 64), {}, ""),
        (online("1" * 64), {}, online("2" * 64), {}, "other text towers"),
        ({"text": {"mode": "cached"}}, CACHED, online("1" * 64), {}, ""),
    ],
)
def test_another_autoencoder_and_other_towers_are_told(before, theirs, now, ours, said):
    tree = config("run", **before).model_dump(mode="json")
    assert what_was_other(tree, seen(**theirs), config("run", **now), seen(**ours)) == said


def test_run_files_from_before_a_field_mean_its_default():
    tree = config("run", **online("1" * 64)).model_dump(mode="json")
    now = config("run", **online("1" * 64))
    for field in ("final_norm", "layer"):
        del tree["text"]["towers"][0][field]
    assert what_was_other(tree, seen(), now, seen()) == ""
    del tree["text"]["towers"]
    assert what_was_other(tree, seen(), now, seen()) == "other text towers"
    del tree["text"]
    assert what_was_other(tree, seen(), config("run"), seen()) == ""


def test_that_is_one_line(tmp_path, latents, manifest, capfd):
    write(latents, tmp_path, 4)
    other = manifest.fingerprint.model_copy(update={"autoencoder_weights": "x"})
    begin(config(tmp_path), manifest.model_copy(update={"fingerprint": other}), alone(), small_engine(alone()))
    _, line = capfd.readouterr().err.splitlines()
    assert line == "these weights learned with another autoencoder than this run's"
