"""T2: averages are made of float32 masters, in every engine."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.runtime import state
from pipeline.runtime.process import Process
from pipeline.train.ema_profiles import decay_at
from rank_checks.nets import (
    AVERAGES,
    ENGINES,
    KEYS,
    MANY_STEPS,
    RATE,
    backward,
    build,
    inputs,
    references,
    train,
    worst,
)


def against_reference(
    ranks: Process, stage: int, precision: str, steps: int = MANY_STEPS, **settings: Any
) -> dict[str, Any]:
    """All ranks have the same batches, so that a sum over ranks rounds nothing."""
    built = build(ranks, stage, precision, fused=False, **settings)
    train(built, inputs(steps))
    *_, (module, averages) = references(steps, precision=precision, flat=stage == 0)
    return {
        "engine": str(built),
        "weight": worst(built, dict(module.named_parameters()), state.WEIGHT),
        "averages": {key: worst(built, averages[key], key) for key in KEYS},
        "dtypes": sorted({str(f.tensors[key].dtype) for f in state.fragments(built) for key in KEYS}),
        "fragments": [(f.parameter, f.offset, f.length) for f in state.fragments(built)],
        "updates": state.optimizer_step(built) if built.outcomes(wait=True) else 0,
    }


def against_float32(ranks: Process, stage: int, precision: str) -> dict[str, Any]:
    """How far masters, at their worst, and averages are from the steps in float32; and the largest weight."""
    built, off, by_hand = build(ranks, stage, precision, fused=False), 0.0, references(MANY_STEPS, flat=stage == 0)
    for x in inputs(MANY_STEPS):
        train(built, x[None])
        module, averages = next(by_hand)
        off = max(off, worst(built, dict(module.named_parameters()), state.WEIGHT))
    return {
        "weight": off,
        "averages": {key: worst(built, averages[key], key) for key in KEYS},
        "largest": max(float(p.detach().abs().max()) for p in module.parameters()),
    }


def against_masters(ranks: Process, stage: int, precision: str, steps: int = MANY_STEPS) -> dict[str, float]:
    """Averages by hand of the masters after each step, and of those rounded as working weights are."""
    built = build(ranks, stage, precision)
    exact, rounded = ([{key: t.clone() for key, t in f.tensors.items()} for f in state.fragments(built)] for _ in "ab")
    for step, x in enumerate(inputs(steps), start=1):
        backward(built, x)
        built.step(RATE)
        for place, fragment in enumerate(state.fragments(built)):
            master = fragment.tensors[state.WEIGHT]
            low = master.to(getattr(torch, precision)).float()
            for key, average in zip(KEYS, AVERAGES, strict=True):
                exact[place][key].lerp_(master, 1 - decay_at(average, step))
                rounded[place][key].lerp_(low, 1 - decay_at(average, step))

    def off(by_hand: list[dict[str, torch.Tensor]]) -> float:
        pairs = zip(state.fragments(built), by_hand, strict=True)
        return max(float((f.tensors[key] - hand[key]).abs().max()) for f, hand in pairs for key in KEYS)

    return {"masters": off(exact), "working_weights": off(rounded)}


def checks(ranks: Process) -> dict[str, Any]:
    result: dict[str, Any] = {"float32": {}, "bfloat16": {}, "by_hand": {}, "rounding": {}, "offloaded": {}}
    for name, stage in ENGINES.items():
        result["float32"][name] = against_reference(ranks, stage, "float32")
        result["bfloat16"][name] = against_reference(ranks, stage, "bfloat16")
        result["by_hand"][name] = against_masters(ranks, stage, "bfloat16")
        result["rounding"][name] = against_float32(ranks, stage, "bfloat16")
        if stage:
            result["offloaded"][name] = against_reference(ranks, stage, "float32", 6, offload_optimizer=True)
    for name, settings in {"parameters": {"offload_optimizer": True}, "parameters alone": {}}.items():
        found = against_reference(ranks, 3, "float32", 6, offload_parameters=True, **settings)
        result["offloaded"][name] = found
    return result
