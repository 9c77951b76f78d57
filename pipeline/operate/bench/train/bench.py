"""`lathe bench train`: what the trainer costs beside a bare loop.

(a) The reference network: step time of the whole trainer (loader, noise, averages, metrics, log) over that of a bare
DeepSpeed loop of the same network with its batch in memory. Turns of a few steps, one after the other in one process,
so that a noisy neighbour meets both; ratios of pairs, their median, and its 95 % interval by bootstrap.
(b) A tiny network: the CPU time that the trainer adds to a step, not lost among that of the network's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.console import tell
from pipeline.cores import available_cores
from pipeline.errors import SetupError
from pipeline.operate.bench.loader.samples import QUARTER, write_latents, write_samples
from pipeline.operate.bench.setting import setting
from pipeline.operate.bench.train.gpu import stated_step_seconds
from pipeline.operate.bench.train.sizes import Pairs, TrainBench
from pipeline.runtime.peak import peak_flops
from pipeline.storage import open_store

PACKAGES = ("torch", "deepspeed", "accelerate", "diffusers", "open-clip-torch", "numpy")
ORDER = ("trainer", "bare", "bare_averaged", "usual")
RANK = "pipeline.operate.bench.train.rank"
_DRAWS = 10_000  # of the bootstrap

Say = Callable[[str], None]


def bench_train(bench: TrainBench, say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure of the benchmark, with the machine and the sizes.

    Raises:
        SetupError: a rank failed.
    """
    about = setting(PACKAGES)  # before there is any load of our own
    measured = measure_both(bench, say, "pairs of {} steps")
    found = {kind: judged(result, bench.precision) for kind, result in measured.items()}
    reference, tiny = found["reference"], found["tiny"]
    return {
        "bench": "train",
        "step_over_bare": reference["over"]["bare"]["median"],
        "usual_over_step": reference["usual_over_step"]["median"],
        "added_cpu_milliseconds": tiny["added_cpu_milliseconds"]["median"],
        "stated_step_seconds": stated_step_seconds(),
        **found,
        "sizes": asdict(bench),
        "setting": about,
    }


def prepare(bench: TrainBench, folder: Path) -> None:
    """Write the latents that `measure` trains on."""
    write_samples(folder / "samples", QUARTER, bench.samples)
    store = open_store(str(folder / "latents"))
    write_latents(folder / "samples", store, QUARTER, per_shard=max(1, bench.samples // 4), block_samples=64)


def measure_both(bench: TrainBench, say: Say, told: str, module: str = RANK) -> dict[str, dict[str, Any]]:
    """What ranks find with the reference network and with the tiny one, on the same latents.

    Args:
        bench: the sizes.
        say: gets a line before each part.
        told: what the rounds are, with {} for their steps.
        module: that the ranks run.

    Raises:
        SetupError: a rank failed.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as name:
        folder = Path(name)
        say(f"writing {bench.samples:,} latents")
        prepare(bench, folder)
        for kind, pairs in (("reference", bench.reference), ("tiny", bench.tiny)):
            say(f"the {kind} network: {pairs.pairs} {told.format(pairs.steps)}")
            found[kind] = measure(bench, pairs, folder, kind, module)
    return found


def measure(bench: TrainBench, pairs: Pairs, folder: Path, kind: str, module: str = RANK) -> dict[str, Any]:
    """What one rank writes of the turns.

    Args:
        bench: ranks and engine.
        pairs: of turns.
        folder: as `prepare` left it.
        kind: names files in it.
        module: that the ranks run.

    Raises:
        SetupError: a rank failed.
    """
    config = bench.config(pairs, str(folder / "latents" / "manifest.json"), str(folder / kind))
    job, result = folder / f"{kind}.job.json", folder / f"{kind}.result.json"
    told = {name: value for name, value in asdict(pairs).items() if name != "network"}
    job.write_text(json.dumps({"config": config.model_dump(mode="json"), **told}), encoding="utf-8")
    launch(bench.ranks, job, result, module)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def launch(ranks: int, job: Path, result: Path, module: str = RANK) -> None:
    """Start the ranks and wait for them. Raises SetupError with their last words."""
    command = [
        sys.executable,
        "-m",
        "pipeline.runtime.launch",
        "accelerate",
        "--use_deepspeed",
        "--num_processes",
        str(ranks),
    ]
    command += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", module, str(job), str(result)]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        tell(done.stderr)
        raise SetupError("the ranks of the benchmark failed", "what they said stands above")


def judged(measured: dict[str, Any], precision: str) -> dict[str, Any]:
    """Ratios of each round's turns, their medians and intervals, and what was measured."""
    rounds = measured["rounds"]
    names = sorted(rounds[0], key=ORDER.index)
    others = [name for name in names if name != "trainer"]
    seconds = {name: statistics.median(turns[name]["seconds"] for turns in rounds) for name in names}
    rate = measured["flops_per_step"] / seconds["trainer"]
    most = peak_flops(measured["device_name"], precision)
    told = {
        "over": {
            name: interval([turns["trainer"]["seconds"] / turns[name]["seconds"] for turns in rounds])
            for name in others
        },
        "added_milliseconds": _added(rounds, "seconds"),
        "added_cpu_milliseconds": _added(rounds, "cpu_seconds"),
        "seconds": seconds,
        "cpu_seconds": {name: statistics.median(turns[name]["cpu_seconds"] for turns in rounds) for name in names},
        "flops_per_second": rate,
        "mfu": rate / (most * measured["ranks"]) if most else None,
        **measured,
    }
    if "usual" in names:
        told["usual_over_step"] = interval(
            [turns["usual"]["seconds"] / turns["trainer"]["seconds"] for turns in rounds]
        )
    return told


def _added(rounds: Sequence[dict[str, dict[str, float]]], figure: str) -> dict[str, float]:
    return interval([1e3 * (turns["trainer"][figure] - turns["bare"][figure]) for turns in rounds])


def interval(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median, and its 95 % interval by bootstrap (Efron 1979): the median of as many values drawn anew, many times."""
    draws = np.random.default_rng(seed).choice(np.array(values), (_DRAWS, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}
