"""`lathe demo` and `lathe config`: what there is to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline import runfile
from pipeline.cli.arguments import Overrides
from pipeline.console import say


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where everything is kept.")] = Path("lathe-demo"),
    preset: Annotated[str, typer.Option(help="On 2 cores `smoke` takes 2 minutes, `demo` 13, `showcase` 45.")] = "demo",
    s3: Annotated[
        str | None,
        typer.Option(
            "--s3",
            metavar="URL",
            help="Your own server, `http://host:port/bucket`, or a bucket on AWS, `s3://bucket/prefix`; keys from the "
            "usual AWS variables or files. Default: an embedded server on loopback.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete what an earlier run left, and start over.")] = False,
) -> None:
    """Run the whole path on this machine: pack, train-vae, encode, train, sample, export, report.

    Started again after it was stopped, it goes on where it was.

    ```
    lathe demo --preset smoke
    ```
    """
    from pipeline.demo.guided_run import run_demo

    run_demo(folder, preset=preset, s3=s3, fresh=fresh)


def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="Run file; without one, the bundled ones are listed.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a run file with every default filled in and every ${reference} resolved.

    Without a file, the bundled ones are listed.

    ```
    lathe config configs/demo/train.yaml root=my-run steps=500
    ```
    """
    if config is None:
        say("\n".join(runfile.bundled_configs()))
    else:
        say(runfile.dump(runfile.load_any(config, overrides)).rstrip())
