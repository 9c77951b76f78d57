"""The arithmetic of `cluster` for a person: what limits 1, 8, 64 and 512 nodes beside the data."""

from __future__ import annotations

from typing import Any

from pipeline.operate.bench.scaling import cluster
from pipeline.operate.bench.scaling.cluster import NETWORKS_GBIT
from pipeline.operate.bench.tables import Rows, markdown
from pipeline.runtime.deepspeed_config import BUCKET_ELEMENTS
from pipeline.runtime.watchdog import TOLD_PER_SECOND
from pipeline.train.saver import MARKERS_AT_ONCE

_COMMUNICATION = """## Gradients and weights between nodes

Arithmetic, not measured: no such network was to be had. bfloat16, one accumulation, all weights trained.

- **GB**: that each node sends in a step. ZeRO-1 and 2: {zero2} times the weights in 16 bits, as DeepSpeed all-reduces
  gradients, which is twice, and gives out the weights. ZeRO-3: {zero3} times, weights for the forward and the backward
  pass, and gradients once. DDP: twice, and it overlaps that with the backward pass. One node sends nothing.
- **ms**: of that at the full rate of a node's cards: {networks} Gbit/s.
- **hops**: of all rings one after the other, at {hop_us:.0f} us each: one ring of all ranks for each bucket of
  {bucket_millions:.0f} million elements, and one for all weights of ZeRO-1 and 2. This grows with the ranks, the bytes
  do not. NCCL takes trees where they are faster, so it is an upper figure.
- **share**: of a step spent so, at {network} Gbit/s, hops included, {per_gpu} samples a GPU at {low} / {high} pictures
  a second and GPU, where nothing overlaps: so it is in ZeRO-1 and 2 ([engines](engines.md)); ZeRO-3 fetches ahead.
"""
_ACCUMULATION = """With `accumulation` a step computes longer for one update: ZeRO-1 and DDP reduce once a step
whatever it is, so their share falls in proportion; ZeRO-2 reduces gradients for each micro batch, and ZeRO-3 gives out
weights for each, too.
"""
_CHECKPOINTS = """## Checkpoints and lost nodes

Arithmetic on the layout of checkpoints: {state} bytes a weight (weights, Adam's moments and one average in float32),
cut over the ranks, one file and one marker each. Assumed: a copy to the host at {copy:.0f} GB/s a rank and
{fixed:.0f} ms besides, storing at {store:.0f} MB/s a rank into one S3 prefix that takes {writes:,} writes a second,
{read:.0f} ms for each marker, which rank 0 reads {at_once} at a time, {restart:.0f} minutes from a failure to the next
step, and a node that fails as often as those of Llama 3's training: 419 times in 54 days among 2,048 nodes (Dubey et
al. 2024). What was measured of copies and stores: [benchmarks/checkpoint.md](benchmarks/checkpoint.md).

- **every**: the interval that loses least, sqrt(2 x stall x time between failures) (Young 1974), but no less than
  storing takes. `checkpoint.every` is in steps.
- **lost**: of all time, at that interval: stalls; for each failure half an interval, the time that the newest
  checkpoint took to be stored, and starting again.
"""
_METRICS = """## Metrics

A rank tells at most {series} series of itself; rank 0 some of the whole run besides. At a scrape each {scrape:.0f} s:
"""
_TOLD = """One Prometheus takes some hundred thousand samples a second; a line of the log, and what is reduced over
ranks for it, is one collective of a few hundred bytes each `log_every` steps, whatever the ranks. Each rank leaves
where it stands in rank 0's store, at most {told} times a second from all of them: with more ranks each does so less
often.
"""
_LIMITS = """## What limits how many nodes

- **1 node**: compute; with a large batch the loader's memory, as few ranks hold the windows of all positions.
- **8 nodes**: bytes between nodes. At 100 Gbit/s they take {eight_share} of SDXL's step in ZeRO-2, at 3,200
  {eight_fast}. Then a start, at which all ranks read receipts at once.
- **64 nodes**: the same bytes, and {hops_64:,.0f} ms of hops; a node fails {weekly_64:.1f} times a week. The first
  requests of an epoch take one prefix seconds.
- **512 nodes**: hops, {hops_512:,.0f} ms of each step for SDXL unless NCCL takes trees: larger micro batches, or ZeRO-1
  with `accumulation`. A node fails {weekly_512:.0f} times a week: starts alone, of {restart:.0f} minutes each, cost
  {lost_512:.1%} of all time. Embeddings want several prefixes.

Simulated above: the order of the data, requests and bytes by step, caches, planning time and memory. Worked out from
stated rates: this section and the three before it. Run for real: two hosts, as network namespaces of one machine.
"""


def sections(result: dict[str, Any], *, per_gpu: int, rates: tuple[int, ...]) -> list[str]:
    """The page's sections on communication, checkpoints, metrics and limits.

    Args:
        result: of `bench_scaling`.
        per_gpu: samples of a step.
        rates: pictures per second and GPU.
    """
    rows = result["clusters"]
    return [
        _COMMUNICATION.format(
            zero2=sum(cluster.PASSES["ZeRO-1, ZeRO-2"]),
            zero3=sum(cluster.PASSES["ZeRO-3"]),
            networks=", ".join(f"{rate:,}" for rate in NETWORKS_GBIT),
            network=f"{NETWORKS_GBIT[-1]:,}",
            hop_us=cluster.HOP_SECONDS * 1e6,
            bucket_millions=BUCKET_ELEMENTS / 1e6,
            per_gpu=per_gpu,
            low=rates[0],
            high=rates[-1],
        ),
        markdown(_communication_rows(rows, [per_gpu / rate for rate in rates])),
        _ACCUMULATION,
        _CHECKPOINTS.format(
            state=cluster.STATE_BYTES,
            fixed=1e3 * cluster.FIXED_STALL_SECONDS,
            copy=cluster.COPY_BYTES_PER_SECOND / 1e9,
            store=cluster.STORE_BYTES_PER_SECOND / 1e6,
            writes=cluster.PREFIX_WRITES,
            read=1e3 * cluster.READ_SECONDS,
            at_once=MARKERS_AT_ONCE,
            restart=cluster.RESTART_SECONDS / 60,
        ),
        markdown(_checkpoint_rows(rows)),
        _METRICS.format(series=cluster.series_of_a_rank(), scrape=cluster.SCRAPE_SECONDS),
        markdown(_telling_rows(rows)),
        _TOLD.format(told=TOLD_PER_SECOND),
        _LIMITS.format(**_limits(rows, per_gpu / rates[0])),
    ]


def share(communication: dict[str, Any], step_seconds: float, rate: int) -> float:
    """Of a step, the part in which it communicates, where nothing overlaps."""
    spent = communication["seconds"][str(rate)] + communication["latency_seconds"]
    return float(spent / (spent + step_seconds))


def _communication_rows(rows: list[dict[str, Any]], steps: list[float]) -> Rows:
    network = [f"ms at {rate:,}" for rate in NETWORKS_GBIT]
    found = [["model", "engine", "nodes", "GB", *network, "hops, ms", "share"]]
    for row in rows:
        if row["nodes"] > 1:
            for engine, one in row["communication"].items():
                shares = " / ".join(f"{share(one, seconds, NETWORKS_GBIT[-1]):.1%}" for seconds in steps)
                times = [f"{1e3 * one['seconds'][str(rate)]:,.0f}" for rate in NETWORKS_GBIT]
                sent, hops = f"{one['bytes_per_node'] / 1e9:.2f}", f"{1e3 * one['latency_seconds']:,.0f}"
                found.append([row["model"], engine, str(row["nodes"]), sent, *times, hops, shares])
    return found


def _checkpoint_rows(rows: list[dict[str, Any]]) -> Rows:
    found = [["model", "nodes", "MB a rank", "stall, ms", "stored after, s", "requests", "failures a week", "every, s"]]
    found[0].append("lost")
    for row in rows:
        one = row["checkpoint"]
        found.append(
            [
                row["model"],
                str(row["nodes"]),
                f"{one['bytes_per_rank'] / 1e6:,.1f}",
                f"{1e3 * one['stall_seconds']:,.2f}",
                f"{one['store_seconds']:,.2f}",
                f"{one['requests']:,}",
                f"{one['failures_per_week']:.3f}",
                f"{one['best_interval_seconds']:,.0f}",
                f"{one['lost_share']:.3%}",
            ]
        )
    return found


def _telling_rows(rows: list[dict[str, Any]]) -> Rows:
    each = {row["nodes"]: row["telling"] for row in rows}
    found = [["nodes", "series", "samples/s"]]
    found += [[str(nodes), f"{one['series']:,}", f"{one['samples_per_second']:,.0f}"] for nodes, one in each.items()]
    return found


def _limits(rows: list[dict[str, Any]], step_seconds: float) -> dict[str, Any]:
    sdxl = {row["nodes"]: row for row in rows if row["model"] == "SDXL"}
    zero2 = {nodes: row["communication"]["ZeRO-1, ZeRO-2"] for nodes, row in sdxl.items()}
    slow, fast = (f"{share(zero2[8], step_seconds, rate):.0%}" for rate in (NETWORKS_GBIT[0], NETWORKS_GBIT[-1]))
    lost = sdxl[512]["checkpoint"]
    return {
        "eight_share": slow,
        "eight_fast": fast,
        "hops_64": 1e3 * zero2[64]["latency_seconds"],
        "hops_512": 1e3 * zero2[512]["latency_seconds"],
        "weekly_64": sdxl[64]["checkpoint"]["failures_per_week"],
        "weekly_512": lost["failures_per_week"],
        "lost_512": lost["failures_per_week"] / (7 * 86_400) * cluster.RESTART_SECONDS,
        "restart": cluster.RESTART_SECONDS / 60,
    }
