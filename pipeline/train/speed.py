"""How fast steps are, where their time goes, which rank the others wait for, and what memory they take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil
import torch

from pipeline.config import TrainConfig
from pipeline.memory import resident
from pipeline.train.interval import Interval, RankTimes
from pipeline.train.step_clock import Part


def speed(
    config: TrainConfig, interval: Interval, parts: Mapping[Part, float], ranks: Sequence[RankTimes]
) -> dict[str, float]:
    """The table's figures of an interval.

    Args:
        config: the run file.
        interval: of rank 0.
        parts: seconds of rank 0's steps by what they computed.
        ranks: every rank's times.
    """
    images = interval.steps * config.global_batch / interval.seconds
    values = {
        "images_per_second": images,
        "images_per_second_per_device": images / len(ranks),
        "step_seconds": interval.seconds / interval.steps,
        "data_wait_seconds": interval.wait_seconds / interval.steps,
        "ranks_wait_seconds": interval.ranks_wait_seconds / interval.steps,
        "logging_seconds": interval.logging_seconds / interval.steps,
    }
    if not parts:
        return values
    return {
        **values,
        "forward_backward_seconds": parts["forward"] + parts["backward"],
        "optimizer_seconds": parts["optimizer"],
        **straggler(ranks),
    }


def straggler(ranks: Sequence[RankTimes]) -> dict[str, float]:
    """How much slower the slowest rank is than the median one, and which it is.

    Its own time is that for data and the forward pass: backward passes end together, since gradients are reduced then.
    """
    own = [times.wait + times.forward for times in ranks]
    middle = statistics.median(own)
    slowest = max(range(len(own)), key=own.__getitem__)
    return {"straggler_ratio": own[slowest] / middle if middle else 1.0, "slowest_rank": slowest}


def memory(device: torch.device) -> dict[str, float]:
    """Of this rank, in bytes, as far as the system tells; the device's peak is that since the last call."""
    values = resident()
    with suppress(OSError):
        values["host_memory_available_bytes"] = psutil.virtual_memory().available
    if device.type == "cuda":
        values["device_memory_bytes"] = torch.cuda.memory_allocated(device)
        values["device_memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return values
