"""What a step, a checkpoint, a lost node and the metrics cost a cluster: arithmetic on stated rates, nothing measured.

Networks and devices of such clusters are not to be had here; each rate that is assumed has a name below and is on the
page beside its figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.metrics.table import DEFINITIONS, Definition
from pipeline.operate.bench.scaling.measured import RANKS_PER_NODE
from pipeline.runtime.deepspeed_config import BUCKET_ELEMENTS
from pipeline.storage.s3_parts import part_bytes
from pipeline.storage.traffic import BOUNDS_SECONDS, ERROR_KINDS, OPERATIONS, OTHER

PARAMETERS = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}
"""Of the UNets in configs/train, trained whole."""
NETWORKS_GBIT = (100, 400, 3200)
"""What a node's cards send in a second, all together: one card; one card of 400; eight of 400."""
PASSES = {"ZeRO-1, ZeRO-2": 2, "ZeRO-3": 3}
"""How often the network's weights in 16 bits, or as many gradients, go round: gradients are reduced and weights given
out; in ZeRO-3 these twice, for the forward and the backward pass (Rajbhandari et al. 2020, section 7)."""
WORKING_BYTES = 2
STATE_BYTES = 4 + 4 + 8  # float32: weights, one average, Adam's moments
HOP_SECONDS = 5e-6
COPY_BYTES_PER_SECOND = 20e9
FIXED_STALL_SECONDS = 0.1  # agreeing on the save, its small files
STORE_BYTES_PER_SECOND = 200e6
NODE_STORE_BYTES_PER_SECOND = 2e9
NODE_FAILURES_PER_DAY = 419 / 54 / (16_384 / 8)
"""419 unexpected interruptions in 54 days on 16,384 GPUs, eight a node (Llama 3, Dubey et al. 2024, section 3.3.4)."""
RESTART_SECONDS = 600.0
SCRAPE_SECONDS = 15.0

_OF_PARTS = 3  # begun, completed, and a look at what killed writers left


@dataclass(frozen=True)
class Communication:
    """What one step sends between nodes.

    Args:
        passes: of the weights' size in 16 bits.
        bytes_per_node: that each node sends in a step.
        seconds: what that takes by the rate of the node's cards, in Gbit/s, at their full rate.
        latency_seconds: of the hops of all rings, one after the other: passes x buckets x (ranks - 1) x a hop.
    """

    passes: int
    bytes_per_node: float
    seconds: dict[str, float]
    latency_seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, and how often it pays.

    Args:
        bytes_per_rank: a rank's file.
        stall_seconds: for which training stands still, to agree and to copy it.
        store_seconds: until it is stored, in the background.
        requests: that all ranks make to store it.
        failures_per_week: of any node.
        best_interval_seconds: between checkpoints, sqrt(2 x stall x time between failures) (Young 1974), but no less
            than one takes to be stored.
        lost_share: of all time: stalls, half an interval for each failure, and the start after it.
    """

    bytes_per_rank: float
    stall_seconds: float
    store_seconds: float
    requests: int
    failures_per_week: float
    best_interval_seconds: float
    lost_share: float


@dataclass(frozen=True)
class Telling:
    """What Prometheus has to do.

    Args:
        series: of all ranks, at most, but for rank 0's own.
        samples_per_second: at one scrape in 15 s.
    """

    series: int
    samples_per_second: float


def clusters(nodes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Every model on every number of nodes."""
    for model, parameters in PARAMETERS.items():
        for count in nodes:
            yield {
                "model": model,
                "nodes": count,
                "communication": {
                    engine: asdict(communication(parameters, count, passes)) for engine, passes in PASSES.items()
                },
                "checkpoint": asdict(checkpoint(parameters, count)),
                "telling": asdict(telling(count)),
            }


def communication(parameters: int, nodes: int, passes: int) -> Communication:
    """One step between nodes: in a ring over all ranks nearly the whole buffer crosses each node's border once."""
    ranks = nodes * RANKS_PER_NODE
    crossing = passes * WORKING_BYTES * parameters * (ranks - 1) / ranks if nodes > 1 else 0.0
    buckets = -(-parameters // BUCKET_ELEMENTS)
    return Communication(
        passes,
        crossing,
        {str(rate): crossing * 8 / (rate * 1e9) for rate in NETWORKS_GBIT},
        passes * buckets * (ranks - 1) * HOP_SECONDS,
    )


def checkpoint(parameters: int, nodes: int) -> Checkpoint:
    """One average is kept; each rank stores its own file."""
    ranks = nodes * RANKS_PER_NODE
    each = STATE_BYTES * parameters / ranks
    stall = FIXED_STALL_SECONDS + each / COPY_BYTES_PER_SECOND
    storing = each / min(STORE_BYTES_PER_SECOND, NODE_STORE_BYTES_PER_SECOND / RANKS_PER_NODE)
    parts = -(-int(each) // part_bytes())
    failures = nodes * NODE_FAILURES_PER_DAY / 86_400
    interval = max(storing, (2 * stall / failures) ** 0.5)
    return Checkpoint(
        each,
        stall,
        storing,
        ranks * (1 if parts == 1 else parts + _OF_PARTS),
        failures * 7 * 86_400,
        interval,
        stall / interval + failures * (interval / 2 + RESTART_SECONDS),
    )


def telling(nodes: int) -> Telling:
    """As many series as a rank can have at most."""
    series = nodes * RANKS_PER_NODE * series_of_a_rank()
    return Telling(series, series / SCRAPE_SECONDS)


def series_of_a_rank() -> int:
    """The most that a rank other than 0 tells of itself, its storage included."""
    operations = len({*OPERATIONS.values(), OTHER})
    labels = {(): 1, ("operation",): operations, ("kind",): len(ERROR_KINDS)}
    return sum(
        labels[metric.labels] * _lines(metric)
        for metric in DEFINITIONS
        if metric.scope == "local" and {"train", "storage"} & set(metric.jobs)
    )


def _lines(metric: Definition) -> int:
    return len(BOUNDS_SECONDS) + 1 + 2 if metric.kind == "histogram" else 1  # one bucket more, sum and count
