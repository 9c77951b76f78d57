"""What a step costs in each engine, beside a bare loop: processor time of one rank on one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig
from pipeline.runtime import engine
from pipeline.runtime.process import Process
from pipeline.train.optimizer import AdamWithEMA, parameter_groups
from rank_checks.nets import ENGINES, RATE

ROUNDS, BATCH, SIDE = 10, 8, 16


class UNet(nn.Module):
    """Of 25 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        shape = {"block_out_channels": (160, 320), "down_block_types": down, "up_block_types": up}
        self.unet = UNet2DModel(sample_size=SIDE, in_channels=4, out_channels=4, **shape)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return self.unet(x, times).sample


def bare() -> Callable[[Tensor], None]:
    module = UNet()
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, fused=True)

    def step(x: Tensor) -> None:
        module(x, torch.arange(BATCH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(ranks: Process, stage: int) -> Callable[[Tensor], None]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    module = UNet()
    optimizer = AdamWithEMA(parameter_groups(module, 0.0), OptimizerConfig(), [AverageConfig(decay=0.999)])
    built = engine.build(ranks, module, optimizer, EngineConfig(zero_stage=stage), micro_batch=BATCH)  # type: ignore[arg-type]

    def step(x: Tensor) -> None:
        built.backward(built(x, torch.arange(BATCH)).square().mean())
        built.step(RATE)
        built.outcomes()

    return step


def checks(ranks: Process) -> dict[str, float]:
    """Medians of interleaved steps: the bare loop's in milliseconds, the engines' in multiples of it."""
    loops = {"bare": bare(), **{name: ours(ranks, stage) for name, stage in ENGINES.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(ROUNDS + 2):  # the first two make state and buckets
        x = torch.randn(BATCH, 4, SIDE, SIDE)
        for name, step in loops.items():
            started = time.process_time()
            step(x)
            seconds[name].append(time.process_time() - started)
    usual = {name: statistics.median(taken[2:]) for name, taken in seconds.items()}
    return {"bare": usual["bare"] * 1000, **{name: usual[name] / usual["bare"] for name in ENGINES}}
