"""T4: a step that is not finite anywhere is skipped everywhere; float16's loss scale."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import SetupError
from pipeline.runtime import ddp, state
from pipeline.runtime.engine import LossScale
from pipeline.runtime.process import Process
from rank_checks.nets import ENGINES, RATE, backward, build, copied, inputs, outcomes, train, unchanged


def non_finite(ranks: Process, stage: int, precision: str, **settings: Any) -> dict[str, Any]:
    """The last rank's loss is infinite once, with finite gradients: added, not multiplied."""
    built = build(ranks, stage, precision, **settings)
    if precision == "float16":
        built.loss_scale = LossScale(64, 0)
    train(built, inputs()[:2])
    before, told = copied(built), outcomes(built)
    backward(built, inputs()[2], add=torch.inf if ranks.rank == ranks.world_size - 1 else 0.0)
    built.step(RATE)
    told += outcomes(built)
    scale = built.loss_scale
    norm, kept = built.gradient_norm(), unchanged(built, before)
    train(built, inputs()[3:4])
    told += outcomes(built)
    return {"told": told, "norm": norm, "kept": kept and scale in (None, (64, 2)), "steps": state.optimizer_step(built)}


def loss_scale(ranks: Process, stage: int) -> dict[str, Any]:
    """A scale that is too large is halved until gradients fit, and doubled after some good steps."""
    built = build(ranks, stage, "float16", loss_scale={"initial_power": 20, "growth_interval": 4})
    before, told = copied(built), []
    for _ in range(10):
        backward(built, inputs()[0], times=20.0)
        built.step(RATE)
        told += outcomes(built)
        if told[-1] == "APPLIED":
            break
        assert unchanged(built, before)
    settled = built.loss_scale
    seen = []
    for _ in range(9):
        backward(built, inputs()[0])
        built.step(RATE)
        seen.append(built.loss_scale)
    told += outcomes(built)
    built.loss_scale = seen[2]
    return {"told": told, "settled": settled, "seen": seen, "set": built.loss_scale == seen[2]}


class _Waits(TorchDispatchMode):
    """Counts how often the host asks for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def waits(ranks: Process, precision: str) -> dict[str, Any]:
    """Host-device synchronisations of ten steps in DDP, asked for outcomes as the trainer asks.

    Of the flags, which are awaited by an event on GPUs: in which step, and that of which.
    """
    built = build(ranks, 0, precision, clip=1.0, accumulation=2)
    dtype = next(built.module.parameters()).dtype
    flags, read, plain = [], [], ddp._Flag.read

    def watched(flag: ddp._Flag) -> Any:
        read.append((len(flags), flags.index(flag)))
        return plain(flag)

    with _Waits() as counted, patch.object(ddp._Flag, "read", watched):
        for x in inputs(10):
            for part in x.chunk(2):
                built.backward((built(part.to(dtype)).float() - part).square().mean())
            built.step(RATE)
            built.outcomes()
            flags.append(built._flag)
    return {"numbers": counted.count, "flags": read}


def control(ranks: Process) -> int:
    """What the counter says where the host does wait."""
    built = build(ranks, 0)
    with _Waits() as counted:
        built.gradient_norm()
    return counted.count


def refused(ranks: Process) -> str:
    """float16 where DeepSpeed does not run it, as on most CPUs."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    try:
        build(ranks, 2, "float16")
    except SetupError as error:
        return str(error)
    finally:
        get_accelerator().is_fp16_supported = lambda: True
    return ""


def checks(ranks: Process) -> dict[str, Any]:
    result: dict[str, Any] = {"non_finite": {}, "loss_scale": {}, "waits": {}}
    for name, stage in ENGINES.items():
        for precision in ("float32", "bfloat16", "float16"):
            result["non_finite"][f"{name} {precision}"] = non_finite(ranks, stage, precision)
        result["non_finite"][f"{name} accumulation"] = non_finite(ranks, stage, "float32", accumulation=2)
        if stage:
            offloaded = non_finite(ranks, stage, "bfloat16", offload_optimizer=True)
            result["non_finite"][f"{name} offloaded"] = offloaded
        result["loss_scale"][name] = loss_scale(ranks, stage)
    result["waits"] = {precision: waits(ranks, precision) for precision in ("float32", "bfloat16", "float16")}
    result["waits"]["control"] = control(ranks)
    return result
