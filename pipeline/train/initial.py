"""`init_from`: a new run that begins with the weights of another one, as 512 px training does after that at 256 px.

Optimizer, step, data, resolution and objective are the new run's; its averages begin at the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from safetensors.torch import load as read_tensors
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import DataError, StorageError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.train import checkpoint, sharded
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.optimizer import average_name
from pipeline.train.telling import say
from pipeline.train.trained_model import find_run

ORIGIN = "init_from.json"
"""What a checkpoint's run began with, among its files; none where it began at random."""


def origin_of(found: Checkpoint) -> dict[str, Any] | None:
    """What the run of a checkpoint began with. Raises DamagedError."""
    return json.loads(found.read(ORIGIN)) if ORIGIN in found.files else None


def begin(config: TrainConfig, process: Process, engine: Engine) -> dict[str, Any] | None:
    """Give a new run's engine the weights that `init_from` names, if it names any; all ranks call it.

    Returns:
        what to note of it in checkpoints.

    Raises:
        DataError: no complete checkpoint, one that is damaged or of another geometry, or without such weights; on one
            rank it may be LatheError.
        StorageError: it cannot be read.
    """
    if config.init_from is None:
        return None
    chosen = config.init_from
    addresses: list[str] = []  # rank 0's: that run may be about to save another
    sharded.together(process, lambda: addresses.append(_address(chosen.run)) if process.is_main else None)
    found = checkpoint.open_checkpoint(*find_run(process.text_of(0, "".join(addresses))))
    which, key = checkpoint.weights_key(found, chosen.weights)
    learned = what_was_learned(yaml.safe_load(found.read(checkpoint.CONFIG)), config)
    take_weights(found, key, process, engine)
    url = f"{found.store.url}/{found.name}"
    say(f"beginning with weights {which} of {url}, which learned {learned}; steps and optimizer begin anew")
    return {"checkpoint": url, "weights": which, "step": found.step}


def what_was_learned(before: Mapping[str, Any], config: TrainConfig) -> str:
    """What the weights say of noisy latents, and of which latents, where the new run has them on another scale."""
    objective, scale = before["objective"], before.get("normalisation", config.normalisation)
    learned = f"{objective['kind']} {objective['prediction']}"
    if scale == config.normalisation:
        return learned
    return f"{learned} of latents with normalisation={scale}, not {config.normalisation}"


def _address(run: str) -> str:
    store, name = find_run(run)
    return f"{store.url}/{name}"


def take_weights(found: Checkpoint, key: str, process: Process, engine: Engine) -> None:
    """Make a checkpoint's weights those of a new engine, and its averages too; all ranks call it.

    Args:
        found: of any engine and world size.
        key: of its weights, see `checkpoint.weights_key`.
        process: this rank.
        engine: that has made no step.

    Raises:
        DataError: it is damaged, or of another geometry; LatheError on other ranks.
    """
    frozen: dict[str, Tensor] = {}
    sharded.together(process, lambda: frozen.update(_fill_if_there(found, key, engine)))
    state.set_frozen(engine, frozen)
    state.restore(engine, 0)


def _fill_if_there(found: Checkpoint, key: str, engine: Engine) -> dict[str, Tensor]:
    where = f"{found.store.url}/{found.name}"
    try:
        frozen = _fill(found, key, engine)
    except StorageError as error:
        if found.store.exists(f"{found.name}/{checkpoint.COMPLETE}"):
            raise
        raise DataError(
            f"init_from: {where} was deleted while it was read, by the run that it is of",
            "start again, or name one that stays there (checkpoint.keep_every)",
        ) from error
    broken = [mine.parameter for mine in state.fragments(engine) if not mine.tensors[state.WEIGHT].isfinite().all()]
    if broken:
        raise DataError(f"init_from: weights of {where} are not finite: {broken[0]}", "name an earlier checkpoint")
    return frozen


def _fill(found: Checkpoint, key: str, engine: Engine) -> dict[str, Tensor]:
    """Weights and averages of this rank's fragments; returns what the optimizer does not know, for `set_frozen`."""
    trained_there: Mapping[str, list[int]] = found.run()["parameters"]
    there = read_tensors(found.read(checkpoint.FROZEN))
    _check_geometry(found, {**trained_there, **{n: list(t.shape) for n, t in there.items()}}, state.geometry(engine))
    keys = [own for own in state.keys(engine) if own == state.WEIGHT or average_name(own)]
    sharded.fill(found, engine, dict.fromkeys(keys, key), trained_there)
    for mine in state.fragments(engine):
        if mine.parameter in there:  # frozen before, and trained now
            part = there[mine.parameter].flatten()[mine.offset : mine.offset + mine.length]
            for own in keys:
                mine.tensors[own].copy_(part)
    frozen = [name for name in state.geometry(engine) if name not in state.shapes(engine)]
    if any(name in trained_there for name in frozen):
        there |= checkpoint.combine([(found, {key: 1.0})], trained_there)
    return {name: there[name] for name in frozen}


def _check_geometry(found: Checkpoint, there: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in dict.fromkeys([*here, *there]):
        if there.get(name) != here.get(name):
            raise DataError(
                f"init_from: {found.store.url}/{found.name} is of another model: {name} has shape"
                f" {there.get(name, 'none')} there and {here.get(name, 'none')} here",
                f"give `unet` and `text` the geometry of its {checkpoint.CONFIG}, or leave init_from out",
            )
