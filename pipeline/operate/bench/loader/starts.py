"""Seconds from start to first batch on S3, at the beginning and in the middle of an epoch; and posterior sampling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pipeline.data.prepare import Preparation, Scale
from pipeline.operate.bench.loader.ours import Work
from pipeline.operate.bench.loader.rivals import Rivals

RESUMED_AT = (0.0, 0.01, 0.5, 0.99)  # of an epoch


def measure_starts(work: Work, rivals: Rivals, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """From nothing but imports to the first batch, and the whole process, in turn at each place; medians.

    Each is a process of its own: nothing is open yet, no connection either.
    """
    figures: dict[str, list[dict[str, float]]] = {f"{place:.0%}": [] for place in RESUMED_AT}
    for number in range(repeats):
        say(f"start and resume, round {number + 1} of {repeats}")
        for place in RESUMED_AT:
            begun = time.perf_counter()
            with rivals.ours(replace(work, start_step=int(place * work.steps))) as ours:
                answer = ours.ask("start")
                figures[f"{place:.0%}"].append({**answer, "process_seconds": time.perf_counter() - begun})
    medians = {
        place: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for place, rounds in figures.items()
    }
    start = medians["0%"]["first_seconds"]
    later = [one["first_seconds"] for place, one in medians.items() if place != "0%"]
    return {
        "start_seconds": start,
        "resume_over_start": max(later) / start,
        "median": medians,
        "rounds": figures,
    }


def measure_posterior(batch: int, repeats: int) -> dict[str, Any]:
    """Seconds to draw and whiten one batch of latents, [batch, 4, 32, 32], on the CPU; the median."""
    moments, positions = torch.randn(batch, 8, 32, 32).half(), torch.arange(batch)
    prepare = Preparation(0, Scale("whiten", mean=[0.0] * 4, std=[1.0] * 4), {})
    seconds = []
    for step in range(20 * repeats):
        begun = time.perf_counter()
        prepare.latents(moments, step, positions)
        seconds.append(time.perf_counter() - begun)
    return {"batch": batch, "seconds_per_batch": statistics.median(seconds), "rounds": len(seconds)}
