"""One plan of a whole epoch in a process of its own, on one core: how long it takes, and how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.config import DataSetConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.order import Order, rank_positions
from pipeline.data.planner import HURRIED_STEPS
from pipeline.errors import SetupError
from pipeline.operate.bench.peak import peak_bytes
from pipeline.operate.bench.scaling.epoch import Blocks, plan_epoch
from pipeline.operate.bench.scaling.steps import Steps, plan_steps

RANKS_PER_NODE = 8
EPOCH = 1  # one that has other epochs on both sides
_RESUMED_AT = (0.01, 0.5, 0.99)  # of an epoch

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """What is planned."""

    manifest: str
    ranks: int
    batch: int
    window: int
    block_samples: int
    sample_bytes: int
    steps: int  # that are planned one by one


def measure(job: Job) -> dict[str, Any]:
    """Plan in a new process. Raises SetupError where it fails."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(job))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"the process that was to be measured failed: {done.stderr[-500:]}", "see what it says")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def plan(job: Job) -> dict[str, Any]:
    """In this process: seconds of each part, peak memory, and what was planned.

    Raises:
        ConfigError: the ranks do not divide the batch.
        DataError: the manifest cannot be used.
        SetupError: the system does not tell a process's peak memory.
    """
    sources, seed, blocks = [DataSetConfig(manifest=job.manifest)], 0, Blocks(job.block_samples, job.sample_bytes)
    seconds: dict[str, float] = {}
    datasets = _timed(seconds, "manifest", lambda: open_datasets(sources, global_batch=job.batch))

    def new_order() -> Order:
        sizes = [stream.sizes for stream in datasets.streams]
        return Order(sizes, global_batch=job.batch, seed=seed, window=job.window, groups=datasets.groups)

    order = new_order()
    nodes = min(RANKS_PER_NODE, job.ranks)
    epoch = _timed(seconds, "epoch", lambda: plan_epoch(order, EPOCH, blocks, job.ranks, nodes))
    middle = int((EPOCH + 0.5) * epoch.samples / job.batch)
    warm = job.window * len(datasets.streams)
    steps = range(middle, middle + warm + job.steps)

    def planned(ranks: range) -> Steps:
        return plan_steps(datasets, order, blocks, steps, ranks=ranks, world_size=job.ranks, hurried=HURRIED_STEPS)

    rank = _timed(seconds, "rank_steps", lambda: planned(range(1)))
    peak = peak_bytes()
    positions = rank_positions(job.batch, 0, job.ranks)
    resumed = {}
    for part in _RESUMED_AT:
        step = int((EPOCH + part) * epoch.samples / job.batch)
        start = time.perf_counter()
        new_order().batch(step, positions)
        resumed[f"{part:.0%}"] = time.perf_counter() - start
    return {
        "seconds": seconds | {"total": sum(seconds.values())},
        "peak_bytes": peak,
        "manifest_bytes": Path(job.manifest).stat().st_size,
        "streams": len(datasets.streams),
        "epoch": asdict(epoch),
        "planned_steps": len(steps),
        "rank": _told(rank, warm),
        "node": _told(planned(range(nodes)), warm),
        "resume_seconds": resumed,
    }


def _timed(seconds: dict[str, float], name: str, work: Callable[[], _Result]) -> _Result:
    start = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - start
    return result


def _told(steps: Steps, warm: int) -> Mapping[str, float]:
    """The first step, when everybody starts; and those after the windows of the start are through."""
    later = steps.requests[warm:]
    return {
        "first_step": int(steps.requests[0]),
        "first_step_bytes": int(steps.bytes_read[0]),
        "mean": float(np.mean(later)),
        "largest": int(np.max(later)),
        "mean_bytes": float(np.mean(steps.bytes_read[warm:])),
    }


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.stdout.write(json.dumps(plan(Job(**json.loads(sys.argv[1])))))
