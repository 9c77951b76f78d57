"""The training engine that the run file asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import EngineConfig
from pipeline.errors import ConfigError
from pipeline.runtime.base import AveragingOptimizer, Engine, LossScale, Outcome
from pipeline.runtime.deepspeed_config import check, deepspeed_config
from pipeline.runtime.process import Process

__all__ = ["Engine", "LossScale", "Outcome", "build", "describe", "micro_batch"]


def micro_batch(config: EngineConfig, global_batch: int, world_size: int) -> int:
    """Samples of one rank in one micro batch.

    Raises:
        ConfigError: ranks times `engine.accumulation` do not divide the global batch.
    """
    parts = world_size * config.accumulation
    if global_batch % parts == 0:
        return global_batch // parts
    below = global_batch // parts * parts
    batches = f"global_batch to {f'{below} or ' if below else ''}{below + parts}"
    if global_batch % world_size:
        raise ConfigError(
            f"global_batch: {global_batch} samples cannot be shared equally by {world_size} ranks"
            + (f" of {config.accumulation} micro batches each" if config.accumulation > 1 else ""),
            f"set {batches}, or start another number of ranks",
        )
    share = global_batch // world_size
    divisors = [count for count in range(1, share + 1) if share % count == 0]
    near = sorted(sorted(divisors, key=lambda count: abs(count - config.accumulation))[:2])
    raise ConfigError(
        f"engine.accumulation: {config.accumulation} micro batches cannot share the {share} samples of each of"
        f" {world_size} ranks equally",
        f"set engine.accumulation to {' or '.join(map(str, near))}, or {batches}",
    )


def build(
    process: Process,
    module: nn.Module,
    optimizer: AveragingOptimizer,
    config: EngineConfig,
    *,
    micro_batch: int,
    gradient_clip: float = 0.0,
) -> Engine:
    """Wrap a module and its optimizer in the engine of `config.zero_stage`.

    Args:
        process: this rank.
        module: the whole of what is trained; weights become equal to rank 0's.
        optimizer: over the module's trainable parameters.
        config: which engine, and its settings.
        micro_batch: samples of one rank in one micro batch.
        gradient_clip: largest gradient norm; 0 = no clipping.

    Raises:
        SetupError: what runs is not the engine, stage or world that was asked for.
    """
    if config.compile:
        module.compile()
    if config.zero_stage == 0:
        from pipeline.runtime.ddp import DataParallelEngine

        return DataParallelEngine(process, module, optimizer, config, gradient_clip=gradient_clip)
    from pipeline.runtime import zero

    return zero.build(process, module, optimizer, config, micro_batch=micro_batch, gradient_clip=gradient_clip)


def describe(config: EngineConfig, *, global_batch: int, gradient_clip: float, world_size: int) -> dict[str, Any]:
    """The engine's whole configuration, checked: DeepSpeed's own for ZeRO. Needs no ranks and no GPU.

    Raises:
        ConfigError: it cannot work.
    """
    share = micro_batch(config, global_batch, world_size)
    if config.zero_stage == 0:
        return {
            "engine": "DistributedDataParallel" if world_size > 1 else "none",
            "precision": config.precision,
            "ranks": world_size,
            "train_micro_batch_size_per_gpu": share,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": gradient_clip,
        }
    whole = deepspeed_config(
        config,
        micro_batch=share,
        gradient_clip=gradient_clip,
        world_size=world_size,
        on_gpu=torch.cuda.is_available(),
    )
    check(whole)
    return whole
