from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_shards import BLOCK, write_latents
from support import fingerprint
from typer.testing import CliRunner

from pipeline.cli.bench import app
from pipeline.config import DataSetConfig, LoaderConfig
from pipeline.data.datasets import open_datasets
from pipeline.data.loader import LatentLoader
from pipeline.data.manifest import load_manifest, load_receipt
from pipeline.data.order import Order
from pipeline.data.planner import Planner
from pipeline.errors import ConfigError, SetupError
from pipeline.metrics.numbers import Numbers
from pipeline.metrics.table import DEFINITIONS
from pipeline.operate.bench.scaling import job
from pipeline.operate.bench.scaling.cluster import PARAMETERS, Passes, checkpoint, communication, series_of_a_rank
from pipeline.operate.bench.scaling.cluster_page import share
from pipeline.operate.bench.scaling.data_set import TEXTS, sample_bytes
from pipeline.operate.bench.scaling.epoch import Blocks, EpochPlan, plan_epoch
from pipeline.operate.bench.scaling.job import ScalingBench, bench_scaling
from pipeline.operate.bench.scaling.measured import Job, measure
from pipeline.operate.bench.scaling.page import page, summary
from pipeline.operate.bench.scaling.steps import plan_steps
from pipeline.storage import open_store, traffic

pytestmark = pytest.mark.alone

SEED, WINDOW = 5, 10
SMALL = ScalingBench(
    ranks=16, shards=300, samples=500, buckets=3, batch=512, window=32, block_samples=16, steps=40, receipts_timed=2
)
COUNTED = ("requests", "blocks_read", "bytes_read")


def latents(folder, sizes, buckets=((4, 4),)):
    """Data sets of one and the same folder, and how their samples are stored."""
    mark = fingerprint(resolution=4, context_length=4, buckets=buckets)
    url = write_latents(folder, [dict.fromkeys(buckets, (size, 0)) for size in sizes], fingerprint=mark)
    receipts = [load_receipt(open_store(str(folder)), entry.receipt) for entry in load_manifest(url).shards]
    (each,) = {block.length / block.samples for receipt in receipts for block in receipt.blocks}
    return url, Blocks(BLOCK, int(each))


def opened(url, batch, window=WINDOW):
    datasets = open_datasets([DataSetConfig(manifest=url)], global_batch=batch)
    sizes = [stream.sizes for stream in datasets.streams]
    return datasets, Order(sizes, global_batch=batch, seed=SEED, window=window, groups=datasets.groups)


def loader(datasets, batch, rank=0, world_size=1, start_step=0, window=WINDOW):
    return LatentLoader(
        datasets,
        global_batch=batch,
        seed=SEED,
        window=window,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        config=LoaderConfig(workers=0, steps_ahead=3),
    )


def summed(plans):
    return {name: sum(getattr(plan, name) for plan in plans) for name in COUNTED}


@pytest.mark.parametrize("window", [3, 10, 64])
def test_a_planned_epoch_is_what_loaders_ask_for(tmp_path, monkeypatch, window):
    monkeypatch.setattr(Planner, "_count_hurry", lambda self, reads, entering: None)
    url, blocks = latents(tmp_path, [37, 1, 50, 9, 53, 0])
    batch = 4
    datasets, order = opened(url, batch, window)
    samples = order.streams[0].samples
    assert samples % batch, "one batch is of both epochs"
    plans = [plan_epoch(order, epoch, blocks, batch, 8) for epoch in (0, 1)]
    found = dict.fromkeys(COUNTED, 0)
    for rank in range(batch):
        with loader(datasets, batch, rank, batch, window=window) as reading:
            for _ in range(2 * samples // batch):
                next(reading)
            for name in COUNTED:
                found[name] += reading.counts[name]
    assert summed(plans) == found
    assert plans[0].blocks == sum(-(-size // BLOCK) for size in datasets.streams[0].sizes)
    assert plans[0].blocks_read >= plans[0].blocks


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 80), min_size=1, max_size=10),
    batch=st.integers(1, 8),
    block=st.integers(1, 20),
    window=st.integers(1, 40),
)
def test_a_planned_epoch_is_what_the_planner_asks_for(sizes, batch, block, window):
    """One epoch by itself, as a planner that goes on may hold by chance what the next one begins with."""
    sizes = [*sizes, 3 * batch - sum(sizes) % batch]
    order = Order([sizes], global_batch=batch, seed=SEED, window=window)
    steps = sum(sizes) // batch
    blocks = Blocks(block, 100)
    planned = plan_steps(_Sized([sizes]), order, blocks, range(steps, 2 * steps), ranks=range(batch), world_size=batch)
    plan = plan_epoch(order, 1, blocks, batch, 8)
    assert {name: getattr(planned, name).sum() for name in COUNTED} == summed([plan])
    assert plan.steps == steps


def test_planned_steps_are_what_a_loader_asks_for_step_by_step(tmp_path):
    url, blocks = latents(tmp_path, [41, 30, 22], buckets=((4, 4), (4, 8)))
    batch, world_size, start = 6, 2, 5
    datasets, order = opened(url, batch)
    for rank in range(world_size):
        planned = plan_steps(
            datasets, order, blocks, range(start, start + 40), ranks=[rank], world_size=world_size, hurried=3
        )
        with loader(datasets, batch, rank, world_size, start) as reading:
            before = dict.fromkeys(COUNTED, 0)
            for row in range(40):
                next(reading)
                counts = reading.counts
                for name in COUNTED:
                    assert getattr(planned, name)[row] == counts[name] - before[name], (rank, row, name)
                before = counts


def test_blocks_that_neighbours_of_a_rank_share_are_planned_once():
    """The planner may read a block again whose first reader has left its window; the plan knows no such."""
    sizes = [np.full(7, 136)]
    order = Order(sizes, global_batch=8, seed=SEED, window=WINDOW)
    alone, together = (plan_epoch(order, 0, Blocks(8, 100), ranks, 8) for ranks in (8, 1))
    datasets = _Sized(sizes)
    steps = range(order.streams[0].samples // 8)
    planned = plan_steps(datasets, order, Blocks(8, 100), steps, ranks=[0], world_size=1)
    borders = alone.blocks_read - together.blocks_read
    assert 0 < borders <= 7
    assert together.blocks_read <= planned.blocks_read.sum() <= together.blocks_read + 3


class _Sized:
    """Of data sets no more than a planner asks."""

    def __init__(self, sizes):
        self.streams = [type("Stream", (), {"dataset": 0, "bucket": (4, 4), "sizes": one})() for one in sizes]

    def selected(self, dataset, shard, bucket):
        return None


def test_requests_end_at_4_mib_and_at_shards():
    order = Order([np.full(40, 1000)], global_batch=4, seed=SEED, window=200)
    small, large = (plan_epoch(order, 0, Blocks(50, size), 4, 8) for size in (20, 60_000))
    assert Blocks(50, 20).in_request > 4
    assert Blocks(50, 60_000).in_request == 1
    assert large.requests == large.blocks_read == small.blocks_read
    assert small.requests < large.requests / 3
    assert small.receipts == 40, "runs of ten shards begin and end with them"


def test_windows_of_different_positions_begin_at_different_steps():
    order = Order([np.full(300, 1000)], global_batch=256, seed=SEED, window=64)
    plan = plan_epoch(order, 1, Blocks(16, 100), 256, 8)
    mean = plan.requests / plan.steps
    assert mean == pytest.approx(256 / 64, rel=0.2)
    assert plan.largest_step <= 2 * mean
    assert plan.first_step >= 256 - 1, "an epoch begins everywhere at once"
    assert plan.largest_node_step < plan.first_node_step <= plan.first_step
    assert plan.window_samples / plan.windows == pytest.approx(64 + 16, rel=0.1)


@pytest.fixture(scope="module")
def result():
    said: list[str] = []
    result = bench_scaling(SMALL, said.append)
    assert any("16 ranks" in line for line in said)
    return json.loads(json.dumps(result, allow_nan=False))


def test_every_figure_follows_from_the_plan(result):
    squares, several = result["measured"]
    assert (squares["streams"], several["streams"]) == (1, 3)
    assert squares["epoch"]["samples"] == several["epoch"]["samples"] == 300 * 500
    assert result["plan_seconds"] == max(one["seconds"]["total"] for one in result["measured"])
    assert 1 < result["plan_peak_bytes"] / 2**20 < 500
    assert squares["node"]["mean"] == pytest.approx(8 * squares["rank"]["mean"], rel=0.5)
    assert list(squares["resume_seconds"]) == ["1%", "50%", "99%"]
    rows = {(row["text"], row["grows"], row["nodes"]): row for row in result["nodes"]}
    assert [nodes for text, grows, nodes in rows if text == "token ids" and not grows] == [1, 8, 64]
    one, eight = rows["token ids", False, 1], rows["token ids", False, 8]
    assert eight["per_second"]["100"]["steps"] == 8 * one["per_second"]["100"]["steps"]
    assert one["per_second"]["400"]["bytes"] >= 8 * 400 * one["sample_bytes"]
    assert eight["held_bytes_per_node"] == pytest.approx(one["held_bytes_per_node"] / 8, rel=0.05)
    assert eight["plan"]["blocks_read"] >= one["plan"]["blocks_read"] >= one["plan"]["blocks"]
    assert result["receipts"]["bytes"] > 500 * 8
    assert result["cache"][0]["read_before"] == 1


def test_the_page_tells_figures_and_assumptions(result):
    text = page(result, "lathe bench scaling --ranks 16")
    for said in (
        f"plan_seconds: {result['plan_seconds']:.1f}, to be below 10: passed",
        "300 shards of 500 samples, blocks of 16, window 32",
        "100 and 400 pictures per second and GPU",
        f"77 token ids that is {sample_bytes(TEXTS['token ids']):,} bytes",
        "\nlathe bench scaling --ranks 16\n",
    ):
        assert said in text
    assert "{" not in text
    slow = {**result, "plan_seconds": 10.0, "plan_peak_bytes": 2**30}
    assert page(slow, "").count("MISSED") == summary(slow).count("MISSED") == 2


def test_the_rows_of_nodes_are_what_one_works_out_by_hand(result, monkeypatch):
    """8 nodes of 8 GPUs at 100 or 400 pictures/s: a node makes 800 or 3,200, a batch of 512 takes 1/12.5 or 1/50 s."""
    plan = EpochPlan(
        samples=1000,
        blocks=60,
        blocks_read=70,  # 10 twice
        requests=50,  # 0.05 a picture: 40 or 160 a second and node, 320 or 1,280 in all
        bytes_read=20_000_000,  # 20 kB a picture: 16 or 64 MB a second and node, 0.128 or 0.512 GB in all
        receipts=1234,
        windows=10,
        window_samples=300_000,  # 64 positions a node x 30,000 samples x 20,480 bytes = 36.62 GiB, 4.58 a rank
        largest_node_step=6,  # 75 or 300 a second
    )
    monkeypatch.setattr(job, "plan_epoch", lambda *_: plan)
    text = page({**result, "nodes": list(job._nodes(SMALL, lambda _: None))}, "")
    rows = [line for line in text.splitlines() if line.startswith("| 8 | 512 | 4.58 |")]
    assert rows == [
        "| 8 | 512 | 4.58 | 36.62 | 1,234 | 10 "
        "| 40.0 / 160.0 | 75.0 / 300.0 | 16.0 / 64.0 | 320.0 / 1,280.0 | 0.13 / 0.51 |"
    ]


def test_the_rows_of_the_cache_are_what_one_works_out_by_hand(result):
    """With 8 nodes: 1 - 7/8, 1 - (7/8)^2 = 15/64, 1 - 0.263, 1 - 0.0000016."""
    lines = page(result, "").splitlines()
    (header,) = [line for line in lines if line.startswith("| nodes | simulated |")]
    columns = "".join(f" epoch {e + 1}, 1 - (1 - 1/nodes)^{e} |" for e in (1, 2, 10, 100))
    assert header == f"| nodes | simulated |{columns}"
    assert [
        line for line in lines if line.startswith("| 8 |") and line.endswith("| 12.50% | 23.44% | 73.69% | 100.00% |")
    ]
    assert "| 1 | 100.00% | 100.00% | 100.00% | 100.00% | 100.00% |" in lines


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"ranks": 7}, "--batch 512: is not a multiple of --ranks 7"), ({"shards": 6}, "less than two batches of each")],
)
def test_what_cannot_be_simulated_is_told(changed, said):
    with pytest.raises(ConfigError, match=said):
        bench_scaling(replace(SMALL, **changed))


def test_a_measured_process_that_fails_is_told(tmp_path):
    with pytest.raises(SetupError, match="the process that was to be measured failed"):
        measure(Job(str(tmp_path / "manifest.json"), 1, 8, 8, 8, 100, 10))


def test_the_command_names_what_was_changed(result, tmp_path, monkeypatch):
    benches = []
    monkeypatch.setattr(job, "bench_scaling", lambda bench, say: benches.append(bench) or result)
    options = ["--ranks", "16", "--window", "256", "--report", str(tmp_path / "page.md")]
    done = CliRunner().invoke(app, ["scaling", *options, "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    assert benches == [ScalingBench(ranks=16)]
    assert "lathe bench scaling --ranks 16\n" in (tmp_path / "page.md").read_text()
    assert json.loads((tmp_path / "figures.json").read_text()) == result


def test_what_crosses_between_nodes_is_what_one_works_out_by_hand():
    """1e9 weights of 2 bytes, 3 times round 64 ranks: 6 GB x 63/64; 20 buckets twice and one ring, 63 hops of 5 us."""
    found = communication(1_000_000_000, 8, Passes(2, 1))
    assert found.bytes_per_node == pytest.approx(6e9 * 63 / 64)
    assert found.seconds == pytest.approx({"100": 0.4725, "400": 0.118125, "3200": 0.014765625})
    assert found.latency_seconds == pytest.approx((2 * 20 + 1) * 63 * 5e-6)
    alone = communication(1_000_000_000, 1, Passes(3, 0))
    assert alone.bytes_per_node == 0
    assert set(alone.seconds.values()) == {0}


def test_what_checkpoints_cost_is_what_one_works_out_by_hand(monkeypatch):
    """1e9 weights on 8 ranks, 2 GB each: 0.1 s of copy, 0.1 s besides; 10 s at 200 MB/s, then 8 markers, 16 in 30 ms;
    60 parts and 3 more, a marker, and its reading."""
    monkeypatch.delenv("LATHE_S3_PART_MIB", raising=False)
    one = checkpoint(1_000_000_000, 1)
    assert (one.bytes_per_rank, one.stall_seconds, one.store_seconds) == pytest.approx((2e9, 0.2, 10.015))
    assert one.requests == 8 * (60 + 3 + 2)
    daily = 419 / 54 / 2048
    assert one.failures_per_week == pytest.approx(7 * daily)
    assert one.best_interval_seconds == pytest.approx((2 * 0.2 * 86_400 / daily) ** 0.5)
    halves = one.best_interval_seconds / 2
    assert one.lost_share == pytest.approx(0.2 / halves / 2 + daily / 86_400 * (halves + 10.015 + 600))
    small = checkpoint(1_000_000_000, 512)
    assert small.requests == 4096 * 3, "a file below one part is one request"
    assert small.store_seconds == pytest.approx(8192 / 3500 + 256 * 0.03), "writes of one prefix, then markers"
    assert small.best_interval_seconds >= small.store_seconds


def test_no_interval_loses_less_than_the_best_one():
    for parameters in PARAMETERS.values():
        for nodes in job.NODES:
            one = checkpoint(parameters, nodes)
            failures = one.failures_per_week / (7 * 86_400)
            for other in (one.best_interval_seconds * 2, one.best_interval_seconds / 2):
                if other >= one.store_seconds:
                    lost = one.stall_seconds / other + failures * (other / 2 + one.store_seconds + 600)
                    assert lost >= one.lost_share


def test_a_rank_has_no_more_series_than_the_page_says():
    """Every number that a rank other than 0 can tell, as Prometheus collects it."""
    for operation in {*traffic.OPERATIONS.values(), traffic.OTHER}:
        traffic.count(operation, 0.1)
    numbers = Numbers("train", ["local"], traffic.counters)
    for metric in DEFINITIONS:
        if metric.scope == "local" and "train" in metric.jobs:
            numbers.set(metric.key, 1.0, {})
    series = sum(len(family.samples) for family in numbers.collect())
    assert series == series_of_a_rank()


def test_the_page_tells_the_shares_of_a_step(result):
    (row,) = [one for one in result["clusters"] if (one["model"], one["nodes"]) == ("SDXL", 8)]
    zero2 = row["communication"]["ZeRO-1, ZeRO-2"]
    spent = zero2["seconds"]["100"] + zero2["latency_seconds"]
    assert share(zero2, 0.64, 100) == pytest.approx(spent / (spent + 0.64))
    text = page(result, "")
    for said in (f"At 100 Gbit/s they take {share(zero2, 0.64, 100):.0%} of SDXL's step", "| SD 1.5 | 512 |"):
        assert said in text
