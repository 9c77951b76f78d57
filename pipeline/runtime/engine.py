"""The training engine that the run file asks for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import EngineConfig
from pipeline.errors import ConfigError
from pipeline.runtime.base import DTYPES, AveragingOptimizer, Engine, LossScale, Outcome
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
        module: the whole of what is trained; parameters and buffers become equal to rank 0's.
        optimizer: over the module's trainable parameters.
        config: which engine, and its settings.
        micro_batch: samples of one rank in one micro batch.
        gradient_clip: largest gradient norm; 0 = no clipping.

    Raises:
        SetupError: what runs is not the engine, stage or world that was asked for.
        ConfigError: DeepSpeed finds a contradiction in what it is configured with.
    """
    whole = _configuration(config, micro_batch, gradient_clip, process.world_size)
    module.to(process.device)
    _make_equal(process, module)
    given = _given(process, module, config)
    if config.compile:
        module.compile()
    built: Engine
    if config.zero_stage == 0:
        from pipeline.runtime.ddp import DataParallelEngine

        built = DataParallelEngine(process, module, optimizer, config, gradient_clip=gradient_clip)
    else:
        from pipeline.runtime import zero

        built = zero.build(process, module, optimizer, config, whole)
    built.configuration, built.given = whole, given
    return built


def _make_equal(process: Process, module: nn.Module) -> None:
    """All of it as on rank 0: wrappers send parameters rounded, and buffers or not as their release has it."""
    if process.world_size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole.view(-1).view(torch.uint8), 0)  # of every dtype
            tensor.detach().copy_(whole)


def _given(process: Process, module: nn.Module, config: EngineConfig) -> dict[str, Tensor]:
    """What `precision` rounds of the frozen parameters, for those who go on in another one."""
    if not process.is_main or config.precision == "float32":
        return {}
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    wider = {name: p for name, p in frozen.items() if p.is_floating_point() and p.dtype != DTYPES[config.precision]}
    return {name: p.to("cpu", copy=True) for name, p in wider.items()}


def describe(config: EngineConfig, *, global_batch: int, gradient_clip: float, world_size: int) -> dict[str, Any]:
    """The engine's whole configuration, checked: DeepSpeed's own for ZeRO. Needs no ranks and no GPU.

    Raises:
        ConfigError: it cannot work.
    """
    if config.world_size not in (None, world_size):
        raise ConfigError(
            f"engine.world_size={config.world_size}, but the engine of {world_size}"
            f" rank{'s' if world_size > 1 else ''} is asked for",
            f"ask for that of {config.world_size}, or set engine.world_size to {world_size} or null",
        )
    return _configuration(config, micro_batch(config, global_batch, world_size), gradient_clip, world_size)


def _configuration(config: EngineConfig, share: int, gradient_clip: float, world_size: int) -> dict[str, Any]:
    if config.zero_stage == 0:
        return {
            "engine": "DistributedDataParallel" if world_size > 1 else "none",
            "precision": config.precision,
            "ranks": world_size,
            "train_micro_batch_size_per_gpu": share,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": gradient_clip,
        }
    whole = deepspeed_config(config, micro_batch=share, gradient_clip=gradient_clip, world_size=world_size)
    check(whole)
    return whole
