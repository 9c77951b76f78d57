"""One measured run after another, and what is told of several rounds."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

from pipeline.config import EncodeConfig
from pipeline.encode.job import EncodesAndDescribes, encode
from pipeline.operate.bench.naive import naive
from pipeline.storage import open_store, split

Round = dict[str, float]


def job_config(root: str, resolution: int, batch_size: int, autoencoder: str = "simulated") -> EncodeConfig:
    """The job over the shards of `root`/images; its output is `root`/latents."""
    return EncodeConfig(
        images={"shards": f"{root}/images", "resolution": resolution},  # type: ignore[arg-type]
        autoencoder=autoencoder,
        output=f"{root}/latents",
        batch_size=batch_size,
        metrics={"prometheus": False},  # type: ignore[arg-type]
    )


def timed(run: Callable[[], int]) -> Round:
    """Seconds, and CPU seconds of this process, for each of the pictures that `run` says it did."""
    load, begun, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    pictures = run()
    return {
        "seconds": (time.perf_counter() - begun) / pictures,
        "cpu_seconds": (time.process_time() - cpu) / pictures,
        "load_average_before": load,
    }


def timed_job(config: EncodeConfig, encoder: EncodesAndDescribes, shards: int) -> Round:
    """The whole job, listing and manifest included, over that many shards; its output is deleted."""

    def run() -> int:
        with redirect_stderr(io.StringIO()):  # its introduction
            summary = encode(config, encoder=encoder)
        if summary.encoded != shards or not summary.manifests:
            raise AssertionError(f"{summary.encoded} shards were encoded, and {shards} were to be")
        return summary.tallies[0].samples

    try:
        return timed(run)
    finally:
        delete_below(config.output)


def timed_naive(config: EncodeConfig, encoder: EncodesAndDescribes, shards: int) -> Round:
    """The usual loop over the job's first shards; its output is deleted."""
    try:
        return timed(lambda: naive(config, encoder, shards))
    finally:
        delete_below(config.output)


def named(**runs: Round) -> Round:
    """One round's figures, each with its run's name before it."""
    return {f"{run}_{name}": value for run, figures in runs.items() for name, value in figures.items()}


def told(rounds: Sequence[Round]) -> dict[str, Any]:
    """Every round, the medians, and the best of each figure: the highest ratio, the least that was spent."""
    names = rounds[0]
    return {
        "median": {name: statistics.median(one[name] for one in rounds) for name in names},
        "best": {name: (max if "_over_" in name else min)(one[name] for one in rounds) for name in names},
        "rounds": list(rounds),
    }


def delete_below(url: str) -> None:
    """Everything in a folder or below a prefix, and the folder."""
    above, name = split(url)
    store = open_store(above)
    store.delete(entry.name for entry in store.list(f"{name}/"))
