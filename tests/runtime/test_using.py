"""Averages in place of weights, as an error ends it: without ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.config import AverageConfig, OptimizerConfig
from pipeline.runtime.zero import ZeroEngine
from pipeline.train.optimizer import AdamWithEMA


@pytest.mark.parametrize(("error", "refreshed"), [(InterruptedError, 2), (torch.OutOfMemoryError, 1), (MemoryError, 1)])
def test_zero_asks_nobody_after_an_error_that_may_be_this_ranks_alone(monkeypatch, error, refreshed):
    master, times = torch.ones(3), []
    built = ZeroEngine.__new__(ZeroEngine)
    built._engine = SimpleNamespace(zero_optimization_stage=lambda: 2)
    built._zero = SimpleNamespace(single_partition_of_fp32_groups=[master])
    built.optimizer = AdamWithEMA([{"params": [master]}], OptimizerConfig(), (AverageConfig(decay=0.9),))
    monkeypatch.setattr(ZeroEngine, "refresh", lambda self: times.append(1))
    with pytest.raises(error), built.using("ema.main"):
        raise error
    assert len(times) == refreshed
    assert built._zero.single_partition_of_fp32_groups[0] is master
