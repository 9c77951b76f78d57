"""What a step, a checkpoint, a lost node and the metrics cost a cluster: arithmetic on stated rates, nothing measured.

Networks and devices of such clusters are not to be had here; each rate that is assumed has a name below and is on the
page beside its figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pipeline.metrics.table import DEFINITIONS, Definition
from pipeline.operate.bench.scaling.measured import RANKS_PER_NODE
from pipeline.runtime.deepspeed_config import BUCKET_ELEMENTS
from pipeline.storage.s3_parts import part_bytes
from pipeline.storage.traffic import BOUNDS_SECONDS, ERROR_KINDS, OPERATIONS, OTHER
from pipeline.train.saver import MARKERS_AT_ONCE

PARAMETERS = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684}
"""Of the UNets in configs/train, trained whole."""
NETWORKS_GBIT = (100, 400, 3200)
"""What a node's cards send in a second, all together: one card; one card of 400; eight of 400."""


class Passes(NamedTuple):
    """How often the network's weights in 16 bits, or as many gradients, go round all ranks in a step.

    Args:
        in_buckets: one bucket after the other.
        in_one: all of a parameter group at once.
    """

    in_buckets: int
    in_one: int


PASSES = {"ZeRO-1, ZeRO-2": Passes(2, 1), "ZeRO-3": Passes(3, 0)}
"""As DeepSpeed does it: stages 1 and 2 all-reduce gradients, which is twice round, and then give out the weights; where
Rajbhandari et al. 2020, section 7, has a reduce-scatter, once. ZeRO-3 does that, and gives out the weights twice, for
the forward and the backward pass."""
WORKING_BYTES = 2
STATE_BYTES = 4 + 4 + 8  # float32: weights, one average, Adam's moments
HOP_SECONDS = 5e-6
COPY_BYTES_PER_SECOND = 20e9
FIXED_STALL_SECONDS = 0.1  # agreeing on the save, its small files
STORE_BYTES_PER_SECOND = 200e6
PREFIX_WRITES = 3500
"""PUT and POST requests per second that Amazon S3 says one prefix takes at least."""
READ_SECONDS = 0.03  # of a small object
NODE_FAILURES_PER_DAY = 419 / 54 / (16_384 / 8)
"""419 unexpected interruptions in 54 days on 16,384 GPUs, eight a node (Llama 3, Dubey et al. 2024, section 3.3.4)."""
RESTART_SECONDS = 600.0
SCRAPE_SECONDS = 15.0

_OF_PARTS = 3  # begun, completed, and a look at what killed writers left


@dataclass(frozen=True)
class Communication:
    """What one step sends between nodes.

    Args:
        bytes_per_node: that each node sends in a step.
        seconds: what that takes by the rate of the node's cards, in Gbit/s, at their full rate.
        latency_seconds: of the hops of all rings, one after the other: rings x (ranks - 1) x a hop.
    """

    bytes_per_node: float
    seconds: dict[str, float]
    latency_seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, and how often it pays.

    Args:
        bytes_per_rank: a rank's file.
        stall_seconds: for which training stands still, to agree and to copy it.
        store_seconds: until it counts, in the background: all files are there, and rank 0 has read all ranks' markers.
        requests: that all ranks make for it: their files and markers, and rank 0's reading of these.
        failures_per_week: of any node.
        best_interval_seconds: between checkpoints, sqrt(2 x stall x time between failures) (Young 1974), but no less
            than one takes to be stored.
        lost_share: of all time: stalls; for each failure half an interval, what came after the newest checkpoint while
            it was being stored, and the start.
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


def communication(parameters: int, nodes: int, passes: Passes) -> Communication:
    """One step between nodes: in a ring over all ranks nearly the whole buffer crosses each node's border once."""
    ranks = nodes * RANKS_PER_NODE
    crossing = sum(passes) * WORKING_BYTES * parameters * (ranks - 1) / ranks if nodes > 1 else 0.0
    rings = passes.in_buckets * -(-parameters // BUCKET_ELEMENTS) + passes.in_one
    return Communication(
        crossing,
        {str(rate): crossing * 8 / (rate * 1e9) for rate in NETWORKS_GBIT},
        rings * (ranks - 1) * HOP_SECONDS,
    )


def checkpoint(parameters: int, nodes: int) -> Checkpoint:
    """One average is kept; each rank stores its own file."""
    ranks = nodes * RANKS_PER_NODE
    each = STATE_BYTES * parameters / ranks
    stall = FIXED_STALL_SECONDS + each / COPY_BYTES_PER_SECOND
    parts = -(-int(each) // part_bytes())
    writes = ranks * ((1 if parts == 1 else parts + _OF_PARTS) + 1)  # and a marker
    storing = max(each / STORE_BYTES_PER_SECOND, writes / PREFIX_WRITES) + ranks / MARKERS_AT_ONCE * READ_SECONDS
    failures = nodes * NODE_FAILURES_PER_DAY / 86_400
    interval = max(storing, (2 * stall / failures) ** 0.5)
    return Checkpoint(
        each,
        stall,
        storing,
        writes + ranks,
        failures * 7 * 86_400,
        interval,
        stall / interval + failures * (interval / 2 + storing + RESTART_SECONDS),
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
