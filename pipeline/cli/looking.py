"""Commands that look at runs: report, watch."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.console import ProgressLine, say

Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Outputs of train, train-vae or encode: folders or s3:// prefixes."),
]


def report(
    runs: Runs,
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="The page, a path or an s3:// address that ends in .html.")
    ] = "report.html",
) -> None:
    """Write a run, or several beside each other, as one HTML page that needs nothing else.

    Curves, losses by noise level, pictures over time, what was rejected, run files, versions. The runs may have
    finished, go on, or have been killed; nothing in them is changed.

    ```
    lathe report my-run/run
    lathe report s3://mine/run-a s3://mine/run-b --output compared.html
    ```
    """
    from pipeline.operate.report.job import report as run

    with ProgressLine("report", "receipts") as line:
        result = run(runs, output, line.update)
    say(result)


def watch(
    runs: Runs,
    every: Annotated[
        float | None,
        typer.Option(
            "--every",
            metavar="SECONDS",
            min=0.1,
            help="Between two looks. Default: 2 on a terminal, 10 elsewhere, 30 for what is on S3 (at least 10 there).",
        ),
    ] = None,
) -> None:
    """Follow runs in a terminal: losses, rates, waits, what is left; or a line now and then in a log.

    Restarts are followed; a run that looks stalled is said to. It ends when all have finished, or by q or Ctrl-C; the
    runs themselves are left alone.

    ```
    lathe watch my-run/run
    lathe watch s3://mine/run-a s3://mine/run-b --every 60
    ```
    """
    from pipeline.operate.watch.job import watch as run

    run(runs, every)
