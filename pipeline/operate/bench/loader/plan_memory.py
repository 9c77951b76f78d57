"""Peak memory of loaders that differ in their number of shards alone, each in a process of its own.

Every shard is the same file under another name, of tiny samples; receipts and manifest are true ones. A whole epoch is
read, so that every shard's plan was needed; windows are small, so that both data sets fill them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.fold import fold
from pipeline.data.manifest import MANIFEST, RECEIPT_SUFFIX, Receipt
from pipeline.operate.bench.loader.ours import Work
from pipeline.operate.bench.loader.rivals import Rivals
from pipeline.operate.bench.loader.samples import NUMBERS, latent_shard, provenance
from pipeline.operate.bench.peak import peak_bytes


@dataclass(frozen=True)
class PlanSizes:
    """Numbers of shards, fewer and more, and what is in each."""

    shards: tuple[int, int] = (10, 1000)
    samples: int = 640
    block_samples: int = 16
    batch: int = 16
    window: int = 16


def measure_plans(sizes: PlanSizes, folder: Path, rivals: Rivals, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes of peak memory for each added shard.

    Raises:
        SetupError: the system does not tell a process's peak memory.
    """
    peak_bytes()  # where that is not known, it is told before anything is written
    peaks = []
    for shards in sizes.shards:
        say(f"memory: an epoch of {shards} shards of {sizes.samples} tiny samples")
        place = folder / f"shards-{shards}"
        write_shards(place, shards, sizes)
        work = Work(str(place / MANIFEST), shards * sizes.samples, workers=2, batch=sizes.batch, window=sizes.window)
        with rivals.ours(work) as ours:
            peaks.append(int(ours.ask("peak")["peak_bytes"]))
    fewer, more = sizes.shards
    return {
        "shards": list(sizes.shards),
        "peak_bytes": peaks,
        "bytes_per_added_shard": (peaks[1] - peaks[0]) / (more - fewer),
    }


def write_shards(place: Path, shards: int, sizes: PlanSizes) -> None:
    """Links to one latent shard, a receipt for each, and the manifest."""
    place.mkdir(parents=True)
    rows = range(sizes.samples)
    data, receipt = latent_shard({"number": np.arange(sizes.samples)}, rows, NUMBERS, "shard.tar", sizes.block_samples)
    (place / "shard.tar").write_bytes(data)

    def receipts() -> Iterator[Receipt]:
        for number in range(shards):
            name = f"{number:05d}.tar"
            os.link(place / "shard.tar", place / name)
            one = receipt.model_copy(update={"shard": name, "source": name})
            (place / (name + RECEIPT_SUFFIX)).write_bytes(one.to_bytes())
            yield one

    (place / MANIFEST).write_bytes(fold(receipts(), provenance(NUMBERS)).to_bytes())
