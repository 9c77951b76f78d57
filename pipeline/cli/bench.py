"""`lathe bench`: the commands that measure."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from pipeline.console import say, tell
from pipeline.errors import ConfigError

app = typer.Typer(
    help="Measure this machine at one job, against what is possible and against the usual way.\n\n"
    "```\nlathe bench encode --json figures.json\n```",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Root = Annotated[
    str, typer.Option("--root", metavar="URL", help="Below it a new folder is made and deleted. Default: a local one.")
]
S3Root = Annotated[
    str,
    typer.Option("--root", metavar="URL", help="Prefix on your own S3 server. Default: an embedded one on loopback."),
]
Size = Annotated[str, typer.Option("--size", help="`small`, `standard` or `large`; how long each takes is said above.")]
Repeats = Annotated[
    int | None, typer.Option("--repeats", metavar="N", min=1, help="Rounds; the figures are their medians.")
]
FiguresFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write every figure there, local or s3://.")
]
ReportFile = Annotated[
    str | None, typer.Option("--report", metavar="FILE", help="Write a page in Markdown there, local or s3://.")
]


@app.command("encode")
def bench_encode(
    root: Root = "",
    size: Size = "standard",
    repeats: Repeats = None,
    figures: FiguresFile = None,
    report: ReportFile = None,
) -> None:
    """Is the device ever idle while `lathe encode` works, and does memory grow with the data?

    The usual loop (fetch, decode, encode, write in turn) is measured beside it. On 2 cores `small` takes 4 minutes,
    `standard` 11, `large` hours.

    ```
    lathe bench encode --json figures.json --report encode.md
    lathe bench encode --size small --root s3://mine/bench
    ```
    """
    from pipeline.operate.bench.encode import bench_encode as run
    from pipeline.operate.bench.encode import sized
    from pipeline.operate.bench.page import page, summary

    result = run(sized(size, root, repeats), tell)
    _hand_over(result, summary(result), figures, report, lambda: page(result, _command("encode", size, repeats)))


@app.command("scaling")
def bench_scaling(
    *,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks whose epoch is planned.")] = 1024,
    shards: Annotated[int, typer.Option(min=1, help="Shards of the data set.")] = 100_000,
    samples: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 10_000,
    buckets: Annotated[int, typer.Option(min=1, help="Picture sizes, where there are several.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Global batch, a multiple of the ranks.")] = 32_768,
    window: Annotated[int, typer.Option(min=1, help="Samples shuffled together, `shuffle_window`.")] = 256,
    figures: FiguresFile = None,
    report: ReportFile = None,
) -> None:
    """What does planning cost at many ranks and shards, and what do they ask of the storage?

    Simulated: nothing is read but manifests of data that are not there. It takes a minute.

    ```
    lathe bench scaling --json scaling.json --report scaling.md
    lathe bench scaling --ranks 64 --batch 4096 --shards 2000
    ```
    """
    from pipeline.operate.bench.scaling.job import ScalingBench
    from pipeline.operate.bench.scaling.job import bench_scaling as run
    from pipeline.operate.bench.scaling.page import page, summary

    given = {"ranks": ranks, "shards": shards, "samples": samples, "buckets": buckets, "batch": batch, "window": window}
    bench = ScalingBench(**given)
    changed = (f" --{name} {value}" for name, value in given.items() if value != getattr(ScalingBench(), name))
    result = run(bench, tell)
    _hand_over(result, summary(result), figures, report, lambda: page(result, "lathe bench scaling" + "".join(changed)))


@app.command("loader")
def bench_loader(
    *,
    root: S3Root = "",
    size: Size = "standard",
    repeats: Repeats = None,
    figures: FiguresFile = None,
    report: ReportFile = None,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="All peers, or webdataset alone.")] = True,
    peers_folder: Annotated[
        Path | None,
        typer.Option("--peers-dir", metavar="DIR", help="Where pip puts the peers once. Default: the user's cache."),
    ] = None,
) -> None:
    """How fast do latents become batches, beside webdataset, mosaicml-streaming, litdata and torch's DataLoader?

    From local files and from S3; with starts, resumes, memory and how well it is shuffled. The peers are installed
    apart from Lathe at the first run. On 2 cores `small` takes 5 minutes, `standard` 20, `large` hours.

    ```
    lathe bench loader --json figures.json --report loader.md
    lathe bench loader --size small --no-peers
    ```
    """
    from pipeline.operate.bench.loader.bench import bench_loader as run
    from pipeline.operate.bench.loader.bench import sized
    from pipeline.operate.bench.loader.page import page, summary
    from pipeline.operate.bench.loader.rivals import cache_folder, find_rivals

    command = _command("loader", size, repeats) + ("" if peers else " --no-peers")
    bench, rivals = sized(size, repeats), find_rivals((peers_folder or cache_folder()) if peers else None)
    with _s3(root) as url:
        result = run(bench, url, rivals, tell)
    _hand_over(result, summary(result), figures, report, lambda: page(result, command))


@app.command("checkpoint")
def bench_checkpoint(
    *,
    root: S3Root = "",
    size: Size = "standard",
    repeats: Repeats = None,
    figures: FiguresFile = None,
    report: ReportFile = None,
) -> None:
    """How long does training stand still for a checkpoint, and what does it cost until it is stored?

    The stall is held against a plain copy of the state in memory. On 2 cores `small` takes a minute, `standard` 5.

    ```
    lathe bench checkpoint --json figures.json --report checkpoint.md
    ```
    """
    from pipeline.operate.bench.checkpoint.job import bench_checkpoint as run
    from pipeline.operate.bench.checkpoint.job import sized
    from pipeline.operate.bench.checkpoint.page import page, summary

    bench = sized(size, repeats)
    with _s3(root) as url:
        result = run(bench, f"{url}/checkpoints", tell)
    command = _command("checkpoint", size, repeats)
    _hand_over(result, summary(result), figures, report, lambda: page(result, command))


@app.command("train")
def bench_train(
    *,
    size: Size = "standard",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks; on GPUs, one for each.")] = 1,
    zero_stage: Annotated[int, typer.Option("--zero", min=1, max=3, help="Stage of ZeRO.")] = 2,
    precision: Annotated[str, typer.Option(help="`float32`, `bfloat16` or `float16`.")] = "float32",
    repeats: Repeats = None,
    figures: FiguresFile = None,
    report: ReportFile = None,
) -> None:
    """What does `lathe train` cost beside a bare DeepSpeed loop, and what does encoding beforehand save?

    The usual way, with autoencoder and text encoder in the loop, is measured beside it. On GPUs it tells MFU. On 2
    cores `small` takes 3 minutes, `standard` 20; `large` is for GPUs.

    ```
    lathe bench train --json figures.json --report train.md
    lathe bench train --size large --ranks 8 --precision bfloat16
    ```
    """
    from pipeline.operate.bench.train.bench import bench_train as run
    from pipeline.operate.bench.train.page import page, summary
    from pipeline.operate.bench.train.sizes import sized

    given = {"ranks": ranks, "zero_stage": zero_stage, "precision": precision}
    usual = {"ranks": 1, "zero_stage": 2, "precision": "float32"}
    options = {"ranks": "ranks", "zero_stage": "zero", "precision": "precision"}
    changed = (f" --{options[name]} {value}" for name, value in given.items() if value != usual[name])
    command = _command("train", size, repeats) + "".join(changed)
    result = run(sized(size, repeats=repeats, **given), tell)
    _hand_over(result, summary(result), figures, report, lambda: page(result, command))


@app.command("metrics")
def bench_metrics(
    *,
    size: Size = "standard",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks; on GPUs, one for each.")] = 1,
    repeats: Repeats = None,
    figures: FiguresFile = None,
    report: ReportFile = None,
) -> None:
    """What does it cost a training step that Prometheus and the log are told of it?

    The same trainer with and without, in turns in one process. On 2 cores `small` takes a minute, `standard` 6; `large`
    is for GPUs.

    ```
    lathe bench metrics --json figures.json --report metrics.md
    ```
    """
    from pipeline.operate.bench.metrics.job import bench_metrics as run
    from pipeline.operate.bench.metrics.job import sized
    from pipeline.operate.bench.metrics.page import page, summary

    command = _command("metrics", size, repeats) + (f" --ranks {ranks}" if ranks > 1 else "")
    result = run(sized(size, repeats=repeats, ranks=ranks), tell)
    _hand_over(result, summary(result), figures, report, lambda: page(result, command))


@contextmanager
def _s3(root: str) -> Iterator[str]:
    """The prefix itself, or one on a server of our own, which the process's variables then tell of."""
    from pipeline.demo.object_store import EmbeddedObjectStore

    if root:
        if not root.startswith("s3://"):
            raise ConfigError(f"--root {root}: not on S3", "write s3://BUCKET/PREFIX, or leave it out")
        yield root
        return
    with TemporaryDirectory(prefix="lathe-bench-s3-") as folder, EmbeddedObjectStore(Path(folder), "bench") as server:
        os.environ.update(server.environment())
        yield server.url


def _command(name: str, size: str, repeats: int | None) -> str:
    """What to type for the same measurement."""
    return f"lathe bench {name} --size {size}" + (f" --repeats {repeats}" if repeats else "")


def _hand_over(
    result: dict[str, Any], summary: str, figures: str | None, report: str | None, page: Callable[[], str]
) -> None:
    """Print the summary; write figures and page where they are wanted. Raises StorageError."""
    say(summary.rstrip())
    if figures is not None:
        _write(figures, json.dumps(result, indent=1) + "\n")
    if report is not None:
        _write(report, page())


def _write(url: str, text: str) -> None:
    from pipeline.storage import open_store, split

    folder, name = split(url)
    open_store(folder).write(name, text.encode())
