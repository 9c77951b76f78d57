"""`init_from`: any engine's weights in a new one, and nothing else of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import DataError, LatheError
from pipeline.runtime import state
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train import checkpoint, initial
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.initial import Source
from rank_checks.elastic import place
from rank_checks.nets import ENGINES, KEYS, build, inputs, train

KEY = "ema.slow"


def saved_by(folder: Path, name: str, world_size: int) -> Checkpoint:
    (saved,) = checkpoint.find(open_store(place(folder, name, world_size)))
    return saved


def begun(ranks: Process, found: Checkpoint, stage: int, **how: Any) -> tuple[Engine, dict[str, Any]]:
    built = build(ranks, stage, **how)
    initial.take_weights(lambda: Source(found, KEY), ranks, built)
    whole = checkpoint.load_weights(found.store, found.name, "slow")
    parts = [(f, whole[f.parameter].flatten()[f.offset : f.offset + f.length]) for f in state.fragments(built)]
    with torch.no_grad():
        plain = nn.functional.silu  # the same network by hand, of whole tensors
        x = inputs()[0] + whole["table.weight"][2]
        x = nn.functional.linear(x, whole["inner.0.weight"], whole["inner.0.bias"])
        x = plain(nn.functional.layer_norm(x, (33,), whole["inner.1.weight"], whole["inner.1.bias"]))
        x = nn.functional.linear(x, whole["inner.3.weight"], whole["inner.3.bias"])
        says = torch.allclose(built.module(inputs()[0]), x, atol=1e-6)
    return built, {
        "weights": all(torch.equal(f.tensors[key], part) for f, part in parts for key in (state.WEIGHT, *KEYS)),
        "moments": not any(f.tensors[key].any() for f, _ in parts for key in ("exp_avg", "exp_avg_sq")),
        "steps": state.optimizer_step(built) == 0,
        "frozen": all(torch.equal(t, whole[name]) for name, t in state.frozen(built).items()),
        "says": says,
    }


def refused(ranks: Process, found: Checkpoint) -> str:
    built = build(ranks, 2)
    built.module.extra = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    try:
        initial.take_weights(lambda: Source(found, KEY), ranks, built)
    except (DataError, LatheError) as error:
        return str(error)
    return ""


def checks(ranks: Process, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"found": {}, "losses": []}
    for source, (name, stage) in zip(reversed(ENGINES), ENGINES.items(), strict=True):
        for world_size in (1, 2):
            found = saved_by(folder, source, world_size)
            built, result["found"][f"{source} of {world_size} to {name}"] = begun(ranks, found, stage)
        result["losses"].append(train(built, inputs(3), ranks))
    for name, stage in ENGINES.items():
        _, found = begun(ranks, saved_by(folder, "zero2", 2), stage, other_way=True)
        result["found"][f"{name} the other way"] = found
    result["refused"] = refused(ranks, saved_by(folder, "zero2", 2))
    return result
