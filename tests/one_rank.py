"""A world of one without a process group, and a small network in an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import AverageConfig, EngineConfig, OptimizerConfig
from pipeline.runtime import engine
from pipeline.runtime.engine import Engine
from pipeline.runtime.process import Process
from pipeline.train.optimizer import AdamWithEMA, parameter_groups


class Alone(Process):
    """A world of one."""

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        return values


def alone() -> Alone:
    """Such a rank."""
    return Alone(rank=0, world_size=1, device=torch.device("cpu"), side_group=None)


def small_engine(ranks: Process) -> Engine:
    """With one average, and buffers."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))
    optimizer = AdamWithEMA(parameter_groups(module, 0.1), OptimizerConfig(), (AverageConfig(decay=0.9),))
    return engine.build(ranks, module, optimizer, EngineConfig(zero_stage=0), micro_batch=4)
