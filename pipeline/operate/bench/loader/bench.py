"""`lathe bench loader`: how fast latents become batches, beside other loaders on the same samples.

Whoever is compared runs in a process of its own and is asked for one whole epoch after another, all in turn, so that a
noisy neighbour meets all. Start-up is not counted, but where it is what is measured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import ConfigError
from pipeline.operate.bench.loader.plan_memory import PlanSizes, measure_plans
from pipeline.operate.bench.loader.rates import RateSizes, Written, measure_local, measure_s3, write_all
from pipeline.operate.bench.loader.rivals import Rivals
from pipeline.operate.bench.loader.samples import KINDS
from pipeline.operate.bench.loader.shuffle import ShuffleSizes, measure_shuffle
from pipeline.operate.bench.loader.starts import measure_posterior
from pipeline.operate.bench.setting import setting

PACKAGES = ("torch", "webdataset", "numpy", "s3fs", "aiobotocore", "isal")

Say = Callable[[str], None]


@dataclass(frozen=True)
class LoaderBench:
    """Sizes of the benchmark."""

    repeats: int = 5
    rates: RateSizes = field(default_factory=RateSizes)
    shuffle: ShuffleSizes = field(default_factory=ShuffleSizes)
    memory: PlanSizes = field(default_factory=PlanSizes)


SIZES = {
    "small": LoaderBench(
        repeats=2,
        rates=RateSizes(samples=4096, per_shard=512, window=8, block_samples=16),
        shuffle=ShuffleSizes(per_shard=192, window=8, block_samples=8),
        memory=PlanSizes(shards=(10, 300), samples=320),
    ),
    "standard": LoaderBench(),
    "large": LoaderBench(repeats=7, rates=RateSizes(samples=65_536, per_shard=4096, window=256)),
}


def sized(name: str, repeats: int | None = None) -> LoaderBench:
    """The benchmark of one of `SIZES`. Raises ConfigError where there is none of that name."""
    if name not in SIZES:
        raise ConfigError(f"--size {name}: unknown", f"use one of {', '.join(SIZES)}")
    return SIZES[name] if repeats is None else replace(SIZES[name], repeats=repeats)


def bench_loader(bench: LoaderBench, s3: str, rivals: Rivals, say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure of the benchmark, with the machine, everyone's settings and the sizes.

    Args:
        bench: sizes.
        s3: address of a prefix on the S3 server that the process's AWS variables tell of; below it a new folder is
            made and deleted.
        rivals: who is compared.
        say: told what is going on.

    Raises:
        SetupError: a peer cannot be run.
        StorageError: the prefix cannot be written.
    """
    about = setting(PACKAGES)  # before there is any load of our own
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as name:
        folder = Path(name)
        memory = measure_plans(bench.memory, folder / "memory", rivals, say)
        shuffle = measure_shuffle(bench.shuffle, folder / "shuffle", rivals, say)
        local: dict[str, Any] = {}
        for kind in KINDS:
            written = write_all(folder / kind, kind, bench.rates, rivals, say)
            local[kind] = measure_local(written, rivals, bench.repeats, say)
            if kind == KINDS[0]:
                remote = _measure_s3(written, s3, rivals, bench.repeats, say)
            shutil.rmtree(written.place)
    return {
        "bench": "loader",
        **headlines(local, remote),
        "spread": shuffle["ours"]["spread"],
        "bytes_per_added_shard": memory["bytes_per_added_shard"],
        "local": local,
        **remote,
        "posterior": measure_posterior(bench.rates.batch, bench.repeats),
        "shuffle": shuffle,
        "memory": memory,
        "peers": rivals.about(),
        "sizes": asdict(bench),
        "setting": about,
    }


def _measure_s3(written: Written, s3: str, rivals: Rivals, repeats: int, say: Say) -> dict[str, Any]:
    return measure_s3(written, f"{s3.rstrip('/')}/bench-loader-{uuid4().hex[:12]}", rivals, repeats, say)


def headlines(local: dict[str, Any], remote: dict[str, Any]) -> dict[str, float]:
    """The figures with goals. Of the kinds of samples the less favourable counts."""

    def least(mode: str, figure: str) -> float:
        return min(float(modes[mode]["median"][figure]) for modes in local.values())

    return {
        "inprocess_over_fastest_peer": least("inprocess", "ours_over_fastest_peer"),
        "workers_over_fastest_peer": least("workers", "ours_over_fastest_peer"),
        "inprocess_over_fastest_tuned": least("inprocess", "ours_over_fastest_tuned"),
        "workers_over_fastest_tuned": least("workers", "ours_over_fastest_tuned"),
        "s3_over_raw": remote["s3"]["median"]["ours_over_raw"],
        "start_seconds": remote["start"]["start_seconds"],
        "resume_over_start": remote["start"]["resume_over_start"],
    }
