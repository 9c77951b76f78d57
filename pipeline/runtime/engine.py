"""The training engine: DeepSpeed ZeRO around one module, with a configuration that leaves nothing to guess."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig
from pipeline.errors import SetupError
from pipeline.runtime.process import Process

_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(config: EngineConfig, micro_batch: int, gradient_clip: float, world_size: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration; no value is "auto".

    Args:
        config: stage and precision.
        micro_batch: samples of one rank in one step.
        gradient_clip: largest gradient norm; 0 = no clipping.
        world_size: ranks.
    """
    return {
        "train_batch_size": micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": gradient_clip,
        "bf16": {"enabled": config.precision == "bfloat16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,  # ours carries the EMA
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "round_robin_gradients": False,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


class Engine:
    """DeepSpeed's engine, as little of it as a training step needs."""

    def __init__(self, deepspeed_engine: Any) -> None:
        self._engine = deepspeed_engine

    @property
    def module(self) -> nn.Module:
        """The module that is trained, with its working weights."""
        module: nn.Module = self._engine.module
        return module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's sharded optimizer, for `pipeline.runtime.state`."""
        return self._engine.optimizer

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that really runs."""
        return int(self._engine.zero_optimization_stage())

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The module's forward."""
        output: Tensor = self._engine(*inputs)
        return output

    def __str__(self) -> str:
        precision = "bfloat16" if self._engine.bfloat16_enabled() else "float32"
        return f"{type(self._engine).__name__}, ZeRO stage {self.zero_stage}, {precision}"

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, reduced over the ranks.

        A loss that is not finite need not give gradients that are not: it is multiplied by 1, or by NaN where it is
        not finite, so that every rank meets the fact in the gradient norm that `step` reduces anyway.
        """
        self._engine.backward(loss * (1.0 + 0.0 * loss.detach()))

    def step(self, learning_rate: float) -> None:
        """Update the weights, on all ranks or, where the gradient norm is not finite, on none.

        A group of parameters whose `rate_ratio` is not 1 learns at so many times `learning_rate`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_ratio", 1.0)
        self._engine.step()

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped because its loss or gradient was not finite; the same on all ranks."""
        return bool(self._engine.optimizer.overflow)

    def gradient_norm(self) -> float:
        """L2 norm of the last gradient over all ranks, before clipping; infinite where it was not finite."""
        return float(self._engine.get_global_grad_norm())


def build(
    process: Process,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    *,
    micro_batch: int,
    gradient_clip: float = 0.0,
) -> Engine:
    """Wrap a module and its optimizer in a DeepSpeed engine.

    Args:
        process: this rank.
        module: the whole of what is trained; weights become equal to rank 0's.
        optimizer: over the module's trainable parameters; ZeRO cuts its state over the ranks.
        config: stage and precision.
        micro_batch: samples of one rank in one step.
        gradient_clip: largest gradient norm; 0 = no clipping.

    Raises:
        SetupError: what runs is not the engine, stage or world that was asked for.
    """
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    whole = deepspeed_config(config, micro_batch, gradient_clip, process.world_size)
    precision = "bf16" if config.precision == "bfloat16" else "no"
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=whole), mixed_precision=precision)
    wrapped, _ = accelerator.prepare(module.to(process.device), optimizer)
    engine = Engine(wrapped)
    _check(wrapped, engine, config, process)
    return engine


def _check(wrapped: Any, engine: Engine, config: EngineConfig, process: Process) -> None:
    import deepspeed

    found = type(wrapped).__name__
    if not isinstance(wrapped, deepspeed.DeepSpeedEngine):
        raise SetupError(f"the engine is {found}, not DeepSpeedEngine", "start it with launchers/accelerate.sh")
    if engine.zero_stage != config.zero_stage:
        raise SetupError(
            f"engine.zero_stage={config.zero_stage}, but ZeRO stage {engine.zero_stage} runs",
            "unset ACCELERATE_DEEPSPEED_* in the environment",
        )
    if wrapped.dp_world_size != process.world_size:
        raise SetupError(
            f"the engine has {wrapped.dp_world_size} ranks, the process group {process.world_size}",
            "start it with launchers/accelerate.sh",
        )
