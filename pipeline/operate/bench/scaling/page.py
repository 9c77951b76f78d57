"""The figures of `lathe bench scaling` for a person: a few lines in the terminal, or a page in Markdown."""

from __future__ import annotations

from typing import Any

from pipeline.config import LoaderConfig
from pipeline.data.planner import REQUEST_BYTES
from pipeline.operate.bench.scaling.cluster_page import sections
from pipeline.operate.bench.scaling.job import PER_GPU, RATES
from pipeline.operate.bench.scaling.measured import RANKS_PER_NODE
from pipeline.operate.bench.tables import Rows, aligned, markdown, passed, setting_rows

MOST_SECONDS, MOST_BYTES = 10.0, 2**30
PREFIX_REQUESTS = 5500
"""GET requests per second that Amazon S3 says one prefix takes at least."""

_MIB, _GIB, _GBIT = 2**20, 2**30, 1e9 / 8

_HEAD = """# Many ranks, many shards

Written by `lathe bench scaling`: what planning costs at {ranks:,} ranks and {shards:,} shards, and what a cluster
asks of its storage, computed from the plan; then, worked out from stated rates, what its network, checkpoints and
metrics cost. Nothing was read but manifests and a few receipts; no network was measured.
"""
_ASSUMPTIONS = """## What is assumed

- {shards:,} shards of {samples:,} samples, blocks of {block_samples}, window {window}, no hold-out, one data set.
  With several picture sizes, {buckets} of them, every shard has as many samples of each.
- Nodes of {gpus} GPUs, one rank each. **{low} and {high} pictures per second and GPU** at 256 px, made up as a large
  and a small model; all else is proportional.
- A sample is an 8x32x32 float16 latent, one caption, size and JSON. With 77 token ids that is {tokens:,} bytes in the
  tar, with a CLIP-H embedding of 77x1024 float16 {embeddings:,} bytes.
- A request ends with its shard, or at {request_mib} MiB, and is of one block at least.
- An epoch in the middle of a run: it begins and ends within a batch.
- A window's blocks are asked for in the step that enters it. The loader asks for what exceeds one request when it is
  needed, which is a little later; the loader's own planner is held against that below.
"""
_PLANNING = """## Planning

A process of its own on one core: reads the manifest.json, plans the whole epoch of all {ranks:,} ranks (every window
of every position, its blocks, its requests, its step), then the steps of one rank with the loader's own planner:
{planned}. Peak memory (`VmHWM`) is of all that, start-up included.
"""
_RESUME = """Most of the time and memory is the manifest's, parsed and validated. What grows with the shards beside it
is a list of sizes and the epoch's permutation; what grows with the samples is nothing.

**Resuming** needs a new order and its first batch: {milliseconds} ms at {resumed} of an epoch. Nothing is replayed.
Then a rank reads what it reads at any start: for each of its positions a receipt and a block.
"""
_STEPS = """## Requests by step

Global batch {batch:,}, {ranks:,} ranks, token ids. The windows of different positions begin at different steps, so
reads come evenly.
"""
_FIRST = """- **Whole epoch**: from the plan. Did all windows begin together, one step in {window} would ask for
  {unstaggered:,} requests and the others for none.
- **One node, one rank**: the loader's own planner in mid-epoch, behind the windows of its start.
- **First step**: of an epoch, in which every position opens a new run elsewhere; of a node or rank, the first of a
  start, in which the loader asks block by block. With several sizes an epoch of each has its own first step; the line
  of the whole epoch has the sum of them.
- A loader plans {ahead} steps ahead, so an epoch's first requests have that long. {first:,} of them are
  {first_seconds:.1f} s of one S3 prefix at its {prefix:,} GET a second; all ranks wait for what is missing by then,
  once in {steps_of_epoch:,} steps. A start costs about the same, and as many receipts before it.
"""
_NODES = """## Nodes

From the plan, with one picture size. Two figures in a cell are at {low} / {high} pictures per second and GPU.

- **held**: the blocks of all windows that a rank, or a node's ranks, are in; a mean, which the staggering keeps.
- **receipts**: read by all ranks in one epoch.
- **twice**: blocks that another rank reads too, as the border of two runs or of an epoch cuts them.
- **peak**: requests in a second at the pace of the node's largest step, but the epoch's first.
"""
_BOUNDS = """## What bounds reading

- **Requests.** {per_picture:.4f} per picture with token ids, {embedding_requests:.4f} with embeddings, whose blocks
  are longer than {request_mib} MiB. Amazon S3 takes at least {prefix:,} GET a second for each prefix. The cluster
  that asks for most here, {most}, makes {most_requests:,.0f} a second: {prefixes}. A data set is one prefix, which S3
  splits by itself under load, with answers of 503 until it has; several data sets (`datasets`) are several.
- **Bytes.** Each byte is read once per epoch, but {extra:.3%} at borders (at {ranks:,} ranks). A node at {high}
  pictures/s a GPU takes {token_gbit:.2f} Gbit/s with token ids and {embedding_gbit:.1f} Gbit/s with embeddings,
  whatever the number of nodes; its network card has 10, 25 or 100.
- **Memory.** For each picture size a rank holds its b windows and the blocks at their ends, about b x (window +
  block) samples, here {window_samples:.0f} a position. Over all ranks that is the global batch, so few nodes with a
  large batch hold much each: {one_node_gib:.0f} GiB for one node at batch {batch:,} and token ids, and as much again
  for each further picture size. A smaller `shuffle_window` makes it less, down to about two blocks a position.
- **Receipts.** {receipt_kib:.0f} KiB each, {receipt_ms:.1f} ms to read and check. A rank reads those of the shards it
  comes to: {receipts:,} over all {ranks:,} ranks in an epoch of one picture size. With {buckets} sizes it is
  {sized_receipts:,}, as each size comes to a shard at another time.
- **Training on a part** (`share`, `keys`). Each rank reads every receipt before it starts: {shards:,} of them are
  {all_gib:.1f} GiB, and {all_seconds:,.0f} s of one core of this machine.
- **The local cache.** In each epoch a shard comes to another node. A cache that could hold everything would find
  1/nodes of what it needs in the second epoch, and 1 - (1 - 1/nodes)^(e - 1) in epoch e. At one node it serves all
  epochs but the first; at 64 it needs many epochs to be of use, and room for nearly all the data ({data_tib:.1f} TiB
  here) on each node. **Simulated** below is the share of shards that the same node reads in two epochs running.
"""
_AGAIN = """## How to repeat it

```
{command}
```
"""


def summary(result: dict[str, Any]) -> str:
    """The main figures as aligned text."""
    parts = [_planning_rows(result), _step_rows(result), _node_rows(result, "token ids", grows=False)]
    return "\n\n".join(map(aligned, parts)) + "\n\n" + "\n".join(_verdicts(result)) + "\n"


def page(result: dict[str, Any], command: str) -> str:
    """The whole page: assumptions, tables, what bounds what, machine, and the command that computes it again."""
    sizes, measured = result["sizes"], result["measured"]
    seconds = [second for one in measured for second in one["resume_seconds"].values()]
    parts = [
        _HEAD.format(**sizes),
        "\n".join(f"- {verdict}" for verdict in _verdicts(result)) + "\n",
        _ASSUMPTIONS.format(**sizes, **_assumed(result)),
        _PLANNING.format(**sizes, planned=_planned(measured)),
        markdown(_planning_rows(result)),
        _RESUME.format(resumed=", ".join(measured[0]["resume_seconds"]), milliseconds=_span(seconds)),
        _STEPS.format(**sizes),
        markdown(_step_rows(result)),
        _FIRST.format(**sizes, **_first(result)),
        _NODES.format(low=RATES[0], high=RATES[-1]),
        *(part for text in _texts(result) for part in _node_tables(result, text)),
        _BOUNDS.format(**sizes, **_bounds(result)),
        markdown(_cache_rows(result)),
        *sections(result, per_gpu=PER_GPU, rates=RATES),
        "## Machine and versions\n",
        markdown([["", ""], *setting_rows(result["setting"])]),
        _AGAIN.format(command=command),
    ]
    return "\n".join(parts)


def _verdicts(result: dict[str, Any]) -> list[str]:
    seconds, peak = result["plan_seconds"], result["plan_peak_bytes"]
    return [
        f"plan_seconds: {seconds:.1f}, to be below {MOST_SECONDS:.0f}: {passed(seconds < MOST_SECONDS)}",
        f"plan_peak_bytes: {peak / _MIB:.0f} MiB, to be below {MOST_BYTES / _MIB:.0f}: {passed(peak < MOST_BYTES)}",
    ]


def _planning_rows(result: dict[str, Any]) -> Rows:
    rows = [["picture sizes", "manifest MiB", "read it, s", "epoch, s", "rank's steps, s", "all, s", "peak MiB"]]
    for one in result["measured"]:
        seconds = [f"{one['seconds'][name]:.2f}" for name in ("manifest", "epoch", "rank_steps", "total")]
        sized = f"{one['manifest_bytes'] / _MIB:.0f}"
        rows.append([str(one["streams"]), sized, *seconds, f"{one['peak_bytes'] / _MIB:.0f}"])
    return rows


def _step_rows(result: dict[str, Any]) -> Rows:
    rows = [["requests in a step", "picture sizes", "mean", "largest", "first of the epoch, or of a start"]]
    for one in result["measured"]:
        plan, streams = one["epoch"], str(one["streams"])
        mean = plan["requests"] / plan["steps"]
        rows.append(
            ["whole epoch, all nodes", streams, f"{mean:.1f}", str(plan["largest_step"]), f"{plan['first_step']:,}"]
        )
        for name in ("node", "rank"):
            part = one[name]
            rows.append(
                [f"one {name}", streams, f"{part['mean']:.2f}", str(part["largest"]), f"{part['first_step']:,}"]
            )
    return rows


def _texts(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in result["nodes"]))


def _node_tables(result: dict[str, Any], text: str) -> list[str]:
    return [
        f"### Latents and {text}, the same batch\n",
        markdown(_node_rows(result, text, grows=False)),
        f"### Latents and {text}, {PER_GPU} samples a GPU\n",
        markdown(_node_rows(result, text, grows=True)),
    ]


def _node_rows(result: dict[str, Any], text: str, *, grows: bool) -> Rows:
    rows = [["nodes", "batch", "held, GiB a rank", "held, GiB a node", "receipts", "twice"]]
    rows[0] += ["requests/s a node", "peak", "MB/s a node", "requests/s in all", "GB/s in all"]
    for one in result["nodes"]:
        if one["text"] == text and one["grows"] == grows:
            held = [f"{one[name] / _GIB:.2f}" for name in ("held_bytes_per_rank", "held_bytes_per_node")]
            read = [f"{one['plan']['receipts']:,}", f"{one['blocks_read_again']:,}"]
            rates = [_by_rate(one, name) for name in ("requests", "largest_requests")]
            rates.append(_by_rate(one, "bytes", 1e6))
            rates += [_by_rate(one, "all_requests"), _by_rate(one, "all_bytes", 1e9)]
            rows.append([str(one["nodes"]), f"{one['batch']:,}", *held, *read, *rates])
    return rows


def _by_rate(row: dict[str, Any], name: str, unit: float = 1.0) -> str:
    values = [row["per_second"][str(rate)][name] / unit for rate in RATES]
    return " / ".join(f"{value:.2f}" if value < 1 else f"{value:,.1f}" for value in values)


def _cache_rows(result: dict[str, Any]) -> Rows:
    epochs = list(result["cache"][0]["expected"])
    rows = [["nodes", "simulated", *(f"epoch {int(epoch) + 1}, 1 - (1 - 1/nodes)^{epoch}" for epoch in epochs)]]
    for one in result["cache"]:
        rows.append([str(one["nodes"]), f"{one['read_before']:.2%}", *(f"{one['expected'][e]:.2%}" for e in epochs)])
    return rows


def _assumed(result: dict[str, Any]) -> dict[str, Any]:
    tokens, embeddings = (
        next(row["sample_bytes"] for row in result["nodes"] if row["text"] == text) for text in _texts(result)
    )
    return {
        "gpus": RANKS_PER_NODE,
        "low": RATES[0],
        "high": RATES[-1],
        "tokens": tokens,
        "embeddings": embeddings,
        "request_mib": REQUEST_BYTES // _MIB,
    }


def _first(result: dict[str, Any]) -> dict[str, Any]:
    plan = result["measured"][0]["epoch"]
    return {
        "unstaggered": round(result["sizes"]["batch"] * plan["requests"] / plan["windows"]),
        "ahead": LoaderConfig().steps_ahead,
        "first": plan["first_step"],
        "first_seconds": plan["first_step"] / PREFIX_REQUESTS,
        "prefix": PREFIX_REQUESTS,
        "steps_of_epoch": plan["steps"],
    }


def _bounds(result: dict[str, Any]) -> dict[str, Any]:
    rate = str(RATES[-1])
    tokens, embeddings = ([row for row in result["nodes"] if row["text"] == text] for text in _texts(result))
    plan, receipts = result["measured"][0]["epoch"], result["receipts"]
    most = max(result["nodes"], key=lambda row: float(row["per_second"][rate]["all_requests"]))
    requests, shards = most["per_second"][rate]["all_requests"], result["sizes"]["shards"]
    return {
        "request_mib": REQUEST_BYTES // _MIB,
        "per_picture": plan["requests"] / plan["samples"],
        "embedding_requests": embeddings[0]["plan"]["requests"] / plan["samples"],
        "high": RATES[-1],
        "prefix": PREFIX_REQUESTS,
        "most": f"{most['nodes']} nodes with {most['text']} at {rate} pictures/s a GPU",
        "most_requests": requests,
        "prefixes": f"the rate of {requests / PREFIX_REQUESTS:.1f} prefixes",
        "extra": plan["blocks_read"] / plan["blocks"] - 1,
        "token_gbit": tokens[0]["per_second"][rate]["bytes"] / _GBIT,
        "embedding_gbit": embeddings[0]["per_second"][rate]["bytes"] / _GBIT,
        "window_samples": plan["window_samples"] / plan["windows"],
        "one_node_gib": tokens[0]["held_bytes_per_node"] / _GIB,
        "receipt_kib": receipts["bytes"] / 2**10,
        "receipt_ms": 1e3 * receipts["plan_seconds"],
        "receipts": plan["receipts"],
        "sized_receipts": result["measured"][-1]["epoch"]["receipts"],
        "all_gib": shards * receipts["bytes"] / _GIB,
        "all_seconds": shards * receipts["select_seconds"],
        "data_tib": plan["bytes_read"] / 2**40,
    }


def _planned(measured: list[dict[str, Any]]) -> str:
    counts = (
        f"{one['planned_steps']:,} with {one['streams']} picture size{'s'[: one['streams'] - 1]}" for one in measured
    )
    return ", ".join(counts)


def _span(values: list[float]) -> str:
    """Seconds as milliseconds."""
    return f"{1e3 * min(values):.0f} to {1e3 * max(values):.0f}"
