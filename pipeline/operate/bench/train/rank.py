"""One rank of `lathe bench train`: turns of the trainer and of bare loops, timed.

`python -m pipeline.operate.bench.train.rank JOB RESULT`, started by `pipeline.runtime.launch`; rank 0 writes the
result.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import TrainConfig
from pipeline.operate.bench.train.loops import BareLoop, WholeTrainer
from pipeline.operate.bench.train.usual import Encoders, UsualLoop
from pipeline.runtime import process
from pipeline.runtime.process import Process

Measured = Callable[[TrainConfig, Process, Mapping[str, Any]], dict[str, Any]]


def measure(config: TrainConfig, ranks: Process, job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and CPU seconds of a step, of everyone in every turn.

    Args:
        config: the trainer's run file.
        ranks: this rank; all call it.
        job: `steps` of a turn, `pairs` of turns, `warmup` steps of everyone before, and `encoders` of the usual way, or
            null.
    """
    trainer = WholeTrainer(config, ranks)
    trainer(1)
    example = trainer.one_example()
    turns: dict[str, Callable[[int], None]] = {
        "trainer": trainer,
        "bare": BareLoop(config, ranks, trainer.manifest, example),
        "bare_averaged": BareLoop(config, ranks, trainer.manifest, example, averaged=True),
    }
    if job["encoders"]:
        batch = config.global_batch // ranks.world_size
        turns["usual"] = UsualLoop(config, ranks, Encoders(**job["encoders"]), batch=batch, manifest=trainer.manifest)
    for turn in turns.values():
        turn(job["warmup"])
    with FlopCounterMode(display=False) as counter:
        turns["bare"](1)
    rounds = []
    for number in range(job["pairs"]):
        order = list(turns) if number % 2 else list(reversed(turns))
        rounds.append({name: timed(turns[name], job["steps"], ranks) for name in order})
    return {
        "rounds": rounds,
        "flops_per_step": counter.get_total_flops() * ranks.world_size,
        "parameters": trainer.parameters,
        "device": ranks.device.type,
        "device_name": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size,
    }


def timed(turn: Callable[[int], None], steps: int, ranks: Process) -> dict[str, float]:
    """A turn's means by step; CPU seconds are those of all threads of this rank."""
    _settle(ranks)
    started, cpu = time.perf_counter(), time.process_time()
    turn(steps)
    _settle(ranks)
    return {
        "seconds": (time.perf_counter() - started) / steps,
        "cpu_seconds": (time.process_time() - cpu) / steps,
    }


def _settle(ranks: Process) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    ranks.agree()


def main(measured: Measured, job: str, result: str) -> None:
    """Measure what the file `job` tells, and write it to the file `result`."""
    told = json.loads(Path(job).read_text(encoding="utf-8"))
    config = TrainConfig.model_validate(told["config"])
    ranks = process.start(config.engine)
    try:
        found = measured(config, ranks, told)
        if ranks.is_main:
            Path(result).write_text(json.dumps(found), encoding="utf-8")
    finally:
        ranks.finish()


if __name__ == "__main__":
    main(measure, *sys.argv[1:])
