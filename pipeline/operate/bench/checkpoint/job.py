"""`lathe bench checkpoint`: how long training stands still for a checkpoint, and what it costs until it is stored."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.errors import ConfigError
from pipeline.memory import MemoryPeak
from pipeline.operate.bench.checkpoint.bed import Bed, Target
from pipeline.operate.bench.setting import setting
from pipeline.storage import open_store

PACKAGES = ("torch", "diffusers", "safetensors", "numpy", "s3fs")
Say = Callable[[str], None]
Figures = dict[str, float]

_LOOK_SECONDS = 0.01  # a save of the small network is soon over


@dataclass(frozen=True)
class CheckpointBench:
    """What is measured: a UNet that is trained, and how often it is saved."""

    widths: tuple[int, ...] = (192, 384)
    side: int = 16  # of the latents
    batch: int = 8
    steps: int = 6  # that nothing disturbs, in each round
    rounds: int = 5
    pairs: int = 25  # of a copy and a stall, without steps between them


SIZES = {
    "small": CheckpointBench(widths=(64, 128), batch=2, steps=3, rounds=3, pairs=15),
    "standard": CheckpointBench(),
    "large": CheckpointBench(widths=(320, 640, 1280), side=32, batch=4),
}


def sized(name: str, repeats: int | None) -> CheckpointBench:
    """One of SIZES, with that many rounds. Raises ConfigError where there is none of that name."""
    if name not in SIZES:
        raise ConfigError(f"--size {name}: there is no such size", f"use one of: {', '.join(SIZES)}")
    return replace(SIZES[name], rounds=repeats) if repeats else SIZES[name]


def bench_checkpoint(bench: CheckpointBench, s3_url: str, say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure, with the machine and the sizes.

    Args:
        bench: what is measured.
        s3_url: where on S3 checkpoints are written; they are deleted.
        say: told what is going on.
    """
    about = setting(PACKAGES)
    with (
        tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder,
        Bed(bench.widths, bench.side, bench.batch) as bed,
    ):
        say(f"a UNet of {bed.parameters / 1e6:.1f} M parameters, {bed.state_bytes / 2**20:.0f} MiB of state")
        targets = {"folder": bed.target(open_store(folder)), "s3": bed.target(open_store(s3_url))}
        bed.steps(2)
        bed.copy()  # touches the memory that is copied to
        first = _pair(bed, targets["folder"])
        pairs = [_pair(bed, targets["folder"]) for _ in range(bench.pairs)]
        say(f"{bench.pairs} pairs: stall over copy {_median(pairs, 'stall_over_copy'):.3f}")
        rounds: dict[str, list[Figures]] = {name: [] for name in targets}
        for number in range(bench.rounds):
            for name, target in targets.items():
                rounds[name].append(_round(bed, target, bench.steps))
            said = (f"{name} {found[-1]['slow_down']:.2f}" for name, found in rounds.items())
            say(f"round {number + 1} of {bench.rounds}: a step while storing over one without, {', '.join(said)}")
        result = {
            "parameters": bed.parameters,
            "state_bytes": bed.state_bytes,
            "file_bytes": targets["folder"].saver.memory_bytes,
            "engine": str(bed.engine),
        }
    return {
        "bench": "checkpoint",
        **{name: _median(pairs, name) for name in first},
        "first": first,
        **result,
        **{store: {name: _median(found, name) for name in found[0]} for store, found in rounds.items()},
        "pairs": pairs,
        "rounds": rounds,
        "sizes": asdict(bench),
        "setting": about,
    }


def _pair(bed: Bed, target: Target) -> Figures:
    """A plain copy before and after the stall of a save, which is waited for."""
    copies = [bed.copy()]
    stall = bed.stall(target)
    target.saver.settle(last=True)
    copies.append(bed.copy())
    copy = statistics.mean(copies)
    return {"stall_over_copy": stall / copy, "stall_seconds": stall, "copy_seconds": copy}


def _round(bed: Bed, target: Target, steps: int) -> Figures:
    """Undisturbed steps, and steps until a save is stored."""
    with MemoryPeak(_LOOK_SECONDS, alone=True) as before:
        quiet = statistics.median(bed.steps(steps))
    with MemoryPeak(_LOOK_SECONDS, alone=True) as during:
        stall = bed.stall(target)
        busy = statistics.median(bed.steps_until_stored(target))
    save = target.done[-1]
    return {
        "stall_seconds": stall,
        "step_seconds": quiet,
        "step_seconds_while_storing": busy,
        "slow_down": busy / quiet,
        "save_seconds": save.seconds,
        "mb_per_second": save.size / 1e6 / save.seconds,
        "added_bytes": max(0, during.bytes - before.bytes),
    }


def _median(found: list[Figures], name: str) -> float:
    return statistics.median(one[name] for one in found)
