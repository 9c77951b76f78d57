"""T1: what any engine saved at any world size, any other takes over to the bit, and goes on as the first did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.runtime import state
from pipeline.runtime.engine import Engine, LossScale
from pipeline.runtime.process import Process
from pipeline.storage import open_store
from pipeline.train import checkpoint, sharded
from rank_checks.nets import ENGINES, KEYS, build, inputs, save, train

BEFORE, AFTER = 6, 20
ALL = [(source, target) for source in ENGINES for target in ENGINES]
ONE_EACH = list(zip(ENGINES, [*list(ENGINES)[1:], "ddp"], strict=True))


def place(folder: Path, name: str, world_size: int) -> str:
    return str(folder / f"elastic-{name}-{world_size}")


def write(ranks: Process, folder: Path) -> None:
    """Six steps, a checkpoint, twenty more; in each engine. Frozen tensors are not what a new network has."""
    for name, stage in ENGINES.items():
        built = build(ranks, stage)
        ahead = train(built, inputs(BEFORE), ranks)
        state.set_frozen(built, {"table.weight": torch.full((5, 7), 0.5), "seen": torch.ones(3)})
        store = open_store(place(folder, name, ranks.world_size))
        built.outcomes(wait=True)
        save(store, ranks, built, step=BEFORE)
        losses = ahead + train(built, inputs(BEFORE + AFTER)[BEFORE:], ranks)
        if ranks.is_main:
            (folder / f"elastic-{name}-{ranks.world_size}.json").write_text(json.dumps(losses))


def equal(built: Engine, saved: checkpoint.Checkpoint) -> bool:
    """Whether this rank's state is the checkpoint's, to the bit, and so is what is frozen."""
    shapes = state.shapes(built)
    whole = {
        key: checkpoint.combine([(saved, {key: 1.0})], shapes) for key in ("weight", "exp_avg", "exp_avg_sq", *KEYS)
    }
    for f in state.fragments(built):
        for key, tensor in f.tensors.items():
            if not torch.equal(tensor, whole[key][f.parameter].flatten()[f.offset : f.offset + f.length]):
                return False
    frozen = state.frozen(built)
    return bool((frozen["table.weight"] == 0.5).all() and (frozen["seen"] == 1).all())


def read(ranks: Process, folder: Path, world_size: int, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """What an engine of `world_size` ranks saved, taken over by another of these ranks: of these pairs."""
    result = {}
    for source, target in pairs:
        (saved,) = checkpoint.find(open_store(place(folder, source, world_size)))
        undisturbed = json.loads((folder / f"elastic-{source}-{world_size}.json").read_text())[BEFORE:]
        built = build(ranks, ENGINES[target])
        counters = sharded.restore(saved, ranks, built, lambda _: None)
        found: dict[str, Any] = {"equal": equal(built, saved), "steps": counters["optimizer_step"]}
        losses = train(built, inputs(BEFORE + AFTER)[BEFORE:], ranks)
        found["off"] = [abs(a / b - 1) for a, b in zip(losses, undisturbed, strict=True)]
        found["after"] = state.optimizer_step(built) if built.outcomes(wait=True) else 0
        result[f"{source} of {world_size} to {target} of {ranks.world_size}"] = found
    return result


def accumulated(ranks: Process) -> dict[str, Any]:
    """One batch as one or as two micro batches, clipped: the same losses but for rounding, in all engines."""
    plain = train(build(ranks, 2, clip=0.3), inputs(12), ranks)
    result = {}
    for name, stage in ENGINES.items():
        for settings in ({"accumulation": 2}, {"accumulation": 2, "offload_optimizer": True} if stage else {}):
            built = build(ranks, stage, clip=0.3, **settings)
            losses = train(built, inputs(12), ranks)
            result[f"{name} {settings}"] = max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True))
    return result


def scaled(ranks: Process, folder: Path) -> dict[str, Any]:
    """float16 saved by each engine, taken over by the next with its loss scale; bit-equal in the same engine."""
    result = {}
    for name, stage in ENGINES.items():
        settings = {"loss_scale": {"initial_power": 8, "growth_interval": 8}}
        first = build(ranks, stage, "float16", **settings)
        train(first, inputs(BEFORE), ranks)
        first.outcomes(wait=True)
        store = open_store(place(folder, f"{name}-float16", ranks.world_size))
        counters = first.loss_scale._asdict()
        save(store, ranks, first, step=BEFORE, counters=counters)
        (saved,) = checkpoint.find(store)
        second = build(ranks, stage, "float16", **settings)
        found = sharded.restore(saved, ranks, second, lambda _: None)
        second.loss_scale = LossScale(found["scale"], found["good_steps"])
        losses = [train(one, inputs(BEFORE + AFTER)[BEFORE:], ranks) for one in (first, second)]
        other = build(ranks, (stage + 1) % 4, "float16", **settings)
        sharded.restore(saved, ranks, other, lambda _: None)
        other.loss_scale = LossScale(found["scale"], found["good_steps"])
        elsewhere = train(other, inputs(BEFORE + AFTER)[BEFORE:], ranks)
        result[name] = {
            "same": losses[0] == losses[1] and first.loss_scale == second.loss_scale,
            "scale": found["scale"],
            "off_elsewhere": max(abs(a / b - 1) for a, b in zip(elsewhere, losses[0], strict=True)),
        }
    return result


def compiled(ranks: Process) -> dict[str, float]:
    """How far losses of compiled networks are from those of others."""
    plain = train(build(ranks, 2), inputs(12), ranks)
    result = {}
    for name, stage in ENGINES.items():
        if stage < 3:
            losses = train(build(ranks, stage, compile=True), inputs(12), ranks)
            result[name] = max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True))
    return result
