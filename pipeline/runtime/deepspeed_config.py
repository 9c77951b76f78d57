"""The whole of DeepSpeed's configuration, made from ours: nothing is "auto", and DeepSpeed's own parser agrees."""

from __future__ import annotations

import os
from typing import Any

import torch

from pipeline.config import EngineConfig
from pipeline.errors import ConfigError

BUCKET_ELEMENTS = 50_000_000
PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3: smaller parameters are kept whole on every rank, since fetching them costs more than their memory."""


def deepspeed_config(
    config: EngineConfig, *, micro_batch: int, gradient_clip: float, world_size: int
) -> dict[str, Any]:
    """The configuration; no value is "auto".

    Args:
        config: stage, precision, accumulation, offload.
        micro_batch: samples of one rank in one micro batch.
        gradient_clip: largest gradient norm; 0 = no clipping.
        world_size: ranks.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
    }
    if config.zero_stage == 3:
        zero |= {
            "overlap_comm": True,
            "sub_group_size": 1_000_000_000,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True, "ratio": 1.0}  # without a GPU nothing is
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": micro_batch * config.accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": gradient_clip,
        "bf16": {"enabled": config.precision == "bfloat16", "check_grad_overflow": True},
        "fp16": {
            "enabled": config.precision == "float16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": config.loss_scale.initial_power,
            "loss_scale_window": config.loss_scale.growth_interval,
            "hysteresis": 1,  # halved at the first overflow
            "min_loss_scale": 1,
        },
        "zero_allow_untested_optimizer": True,  # ours carries the averages
        "zero_force_ds_cpu_optimizer": False,  # offloaded too: DeepSpeedCPUAdam has no averages
        "zero_optimization": zero,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def choose_accelerator() -> None:
    """What DeepSpeed must find before it is imported on a machine without a GPU, which it would warn of."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check(whole: dict[str, Any]) -> None:
    """Have DeepSpeed read it. Needs no ranks and no GPU.

    Raises:
        ConfigError: DeepSpeed finds a contradiction.
    """
    choose_accelerator()
    from deepspeed.runtime.config import DeepSpeedConfig

    ranks: int = whole["train_batch_size"] // (
        whole["train_micro_batch_size_per_gpu"] * whole["gradient_accumulation_steps"]
    )

    class World:
        """As many ranks as will be there."""

        def get_data_parallel_world_size(self) -> int:
            return ranks

    try:
        DeepSpeedConfig(_alone(whole, ranks), mpu=World())
    except (AssertionError, ValueError) as error:
        told = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
        raise ConfigError(f"engine: DeepSpeed refuses it: {told}", "change the setting that it names") from error


def _alone(whole: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Without a process group DeepSpeed takes itself for one rank, whatever it is told."""
    from deepspeed import comm

    if comm.is_initialized():
        return whole
    return {**whole, "train_batch_size": whole["train_batch_size"] // ranks}
