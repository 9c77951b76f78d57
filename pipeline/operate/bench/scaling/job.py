"""`lathe bench scaling`: what planning costs at many ranks and shards, and what those ranks ask of the storage.

Nothing is read but manifests and a few receipts of a data set that nobody encoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataSetConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.order import Order
from pipeline.data.shard_plan import load_plans
from pipeline.errors import ConfigError
from pipeline.operate.bench.scaling.cluster import clusters
from pipeline.operate.bench.scaling.data_set import (
    TEXTS,
    sample_bytes,
    sizes_by_bucket,
    write_manifest,
    write_receipts,
)
from pipeline.operate.bench.scaling.epoch import Blocks, plan_epoch
from pipeline.operate.bench.scaling.measured import EPOCH, RANKS_PER_NODE, Job, measure
from pipeline.operate.bench.setting import setting

NODES = (1, 8, 64, 512)
PER_GPU = 64  # samples, where the batch grows with the nodes
RATES = (100, 400)  # pictures per second and GPU

Say = Callable[[str], None]


@dataclass(frozen=True)
class ScalingBench:
    """What is simulated."""

    ranks: int = 1024
    shards: int = 100_000
    samples: int = 10_000  # of a shard
    buckets: int = 5  # picture sizes, where there are several
    batch: int = 32_768
    window: int = 256
    block_samples: int = 64
    steps: int = 1000  # that the loader's own planner goes through
    receipts_timed: int = 24


def bench_scaling(bench: ScalingBench = ScalingBench(), say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure of the simulation, with the machine and the sizes.

    Raises:
        ConfigError: the ranks do not divide the batch, or the data are less than two batches of each picture size.
        SetupError: the system does not tell a process's peak memory.
    """
    _check(bench)
    about = setting()
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        measured = [_measure(bench, Path(folder), buckets, say) for buckets in sorted({1, bench.buckets})]
        say(f"reading {bench.receipts_timed} receipts")
        receipts = _receipts(bench, Path(folder) / "receipts")
    return {
        "bench": "scaling",
        "plan_seconds": max(one["seconds"]["total"] for one in measured),
        "plan_peak_bytes": max(one["peak_bytes"] for one in measured),
        "measured": measured,
        "nodes": list(_nodes(bench, say)),
        "receipts": receipts,
        "cache": _cache(bench),
        "clusters": list(clusters(NODES)),
        "sizes": asdict(bench),
        "setting": about,
    }


def _check(bench: ScalingBench) -> None:
    if bench.batch % bench.ranks:
        raise ConfigError(f"--batch {bench.batch}: is not a multiple of --ranks {bench.ranks}", "give one that is")
    least = 2 * bench.batch * bench.buckets
    if bench.shards * bench.samples < least:
        raise ConfigError(
            f"--shards {bench.shards}: with --samples {bench.samples} they are less than two batches of each size",
            f"simulate at least {least} samples",
        )


def _measure(bench: ScalingBench, folder: Path, buckets: int, say: Say) -> dict[str, Any]:
    say(f"writing a manifest of {bench.shards} shards, pictures of {buckets} sizes")
    url = write_manifest(folder / f"buckets-{buckets}", bench.shards, bench.samples, buckets)
    say(f"planning an epoch of {bench.ranks} ranks")
    size = sample_bytes(TEXTS["token ids"])
    return measure(Job(url, bench.ranks, bench.batch, bench.window, bench.block_samples, size, bench.steps))


def _nodes(bench: ScalingBench, say: Say) -> Iterator[dict[str, Any]]:
    """The plan at several numbers of nodes: the batch as it is, and growing with them."""
    for name, text in TEXTS.items():
        blocks = Blocks(bench.block_samples, sample_bytes(text))
        for grows in (False, True):
            for nodes in NODES:
                ranks = nodes * RANKS_PER_NODE
                batch = PER_GPU * ranks if grows else bench.batch
                if not batch % ranks and 2 * batch <= bench.shards * bench.samples:
                    say(f"{name}: {nodes} nodes, batch {batch}")
                    yield {"text": name, "grows": grows, **_node(bench, blocks, nodes, batch)}


def _node(bench: ScalingBench, blocks: Blocks, nodes: int, batch: int) -> dict[str, Any]:
    """What one node asks for, by picture and by second; and what it holds."""
    sizes = np.full(bench.shards, bench.samples)
    order = Order([sizes], global_batch=batch, seed=0, window=bench.window)
    plan = plan_epoch(order, EPOCH, blocks, nodes * RANKS_PER_NODE, RANKS_PER_NODE)
    held = batch / nodes * plan.window_samples / plan.windows * blocks.sample_bytes
    by_rate = {}
    for rate in RATES:
        pictures, steps = rate * RANKS_PER_NODE, rate * RANKS_PER_NODE * nodes / batch
        by_rate[str(rate)] = {
            "steps": steps,
            "requests": pictures * plan.requests / plan.samples,
            "largest_requests": plan.largest_node_step * steps,
            "bytes": pictures * plan.bytes_read / plan.samples,
            "all_requests": nodes * pictures * plan.requests / plan.samples,
            "all_bytes": nodes * pictures * plan.bytes_read / plan.samples,
        }
    return {
        "nodes": nodes,
        "batch": batch,
        "sample_bytes": blocks.sample_bytes,
        "held_bytes_per_node": held,
        "held_bytes_per_rank": held / RANKS_PER_NODE,
        "plan": asdict(plan),
        "blocks_read_again": plan.blocks_read_again,
        "per_second": by_rate,
    }


def _receipts(bench: ScalingBench, folder: Path) -> dict[str, Any]:
    """What reading one receipt takes: for the plan of its shard, and for choosing a part of its samples."""
    url = write_receipts(folder, bench.receipts_timed, bench.samples, 1, bench.block_samples)
    whole = open_datasets([DataSetConfig(manifest=url)], global_batch=1)
    start = time.perf_counter()
    for shard in range(bench.receipts_timed):
        load_plans(whole.stores[0], whole.manifests[0], shard, "train")
    plans = time.perf_counter() - start
    start = time.perf_counter()
    open_datasets([DataSetConfig(manifest=url, share=0.5)], global_batch=1)
    part = time.perf_counter() - start
    found = [path.stat().st_size for path in folder.glob("*.receipt.json")]
    return {
        "bytes": sum(found) / len(found),
        "plan_seconds": plans / bench.receipts_timed,
        "select_seconds": part / bench.receipts_timed,
    }


def _cache(bench: ScalingBench) -> list[dict[str, Any]]:
    """Of the shards that a node reads in an epoch, how many it has read in the one before; and in all before."""
    samples = bench.shards * bench.samples
    (size,) = sizes_by_bucket(bench.samples, 1).values()
    order = Order([np.full(bench.shards, size)], global_batch=bench.batch, seed=0, window=bench.window)
    middles = np.arange(size // 2, samples, size)
    owner = []
    for epoch in (EPOCH, EPOCH + 1):
        place = np.empty(bench.shards, np.int64)
        place[order.streams[0].locate(epoch, middles)[0]] = middles
        owner.append(place)
    found = []
    for nodes in NODES:
        before, now = (place * nodes // samples for place in owner)
        hits = {str(epoch): 1 - (1 - 1 / nodes) ** epoch for epoch in (1, 2, 10, 100)}
        found.append({"nodes": nodes, "read_before": float(np.mean(before == now)), "expected": hits})
    return found
