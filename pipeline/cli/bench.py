"""`lathe bench`: the commands that measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipeline.console import say, tell

app = typer.Typer(
    help="Measure this machine at one job, against what is possible and against the usual way.\n\n"
    "```\nlathe bench encode --json figures.json\n```",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Root = Annotated[
    str, typer.Option("--root", metavar="URL", help="Below it a new folder is made and deleted. Default: a local one.")
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
