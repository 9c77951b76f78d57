"""Commands about data: pack, encode, verify, inspect, remove."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline import runfile
from pipeline.cli.arguments import Config, ManifestUrl, Overrides
from pipeline.config import EncodeConfig, PackConfig
from pipeline.console import ProgressLine, say, tell
from pipeline.errors import DataError
from pipeline.stopping import PromptStop


def pack(config: Config, overrides: Overrides = None) -> None:
    """Pack a folder or a table of pictures and captions into WebDataset image shards.

    A folder holds NAME.png beside NAME.txt, or a metadata.jsonl or metadata.csv. A table (CSV, TSV, JSON lines,
    Parquet) has columns for pictures and captions; its other columns go along, for the filters of `lathe encode`.

    ```
    lathe pack configs/pack.yaml source=photos output=s3://mine/images
    lathe pack configs/pack.yaml source=photos.csv output=shards \\
        image_column=path caption_column=title on_error=skip
    ```
    """
    settings = runfile.load(PackConfig, config, overrides)
    from pipeline.data.pack import pack as run

    with ProgressLine("pack", "pictures") as line:
        result = run(settings, line.update)
    say(result)


def encode(
    config: Config,
    overrides: Overrides = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="I/N",
            help="This worker's share: task I of N, counted from 0. Default: what a SLURM array, srun, torchrun or "
            "accelerate says, or an indexed Kubernetes Job with LATHE_TASKS set to its completions; else everything.",
        ),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--finalize", help="Encode nothing: only fold the workers' receipts into the manifest.")
    ] = False,
) -> None:
    """Encode image shards into latent shards and a manifest.

    Run as many workers as you like, each with its share. Stop or lose any of them: the same command goes on where it
    was, with another number of workers too. The one that finishes last writes the manifest.

    ```
    lathe encode configs/demo/encode.yaml root=my-run
    lathe encode run.yaml --task 0/2                    # one of two workers
    sbatch --array=0-15 --wrap "lathe encode run.yaml"  # each finds its share
    ```
    """
    settings = runfile.load(EncodeConfig, config, overrides)
    with PromptStop():
        if fold:
            _finalize(settings)
        else:
            _encode(settings, task)


def _finalize(settings: EncodeConfig) -> None:
    from pipeline.encode.job import finalize

    manifests = finalize(settings)
    for manifest in manifests:
        which = f"{manifest.fingerprint.resolution} px: " if len(manifests) > 1 else ""
        counts = f"{manifest.samples('train')} to train on, {manifest.samples('holdout')} held out"
        say(f"{which}manifest written: {counts}")


def _encode(settings: EncodeConfig, task: str | None) -> None:
    from pipeline.encode.share import find_share

    share = find_share(task, os.environ)  # before torch is loaded: a mistake is told at once
    from pipeline.encode.job import encode as run

    if share.source:
        tell(str(share))
    with ProgressLine("encode", "shards") as line:
        result = run(
            settings,
            (share.index, share.count),
            lambda now: line.update(now.done, now.total, now.note(), now.eta_seconds),
        )
    say(result)


def verify(
    manifest: ManifestUrl,
    *,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images", metavar="URL", help="Where the image shards are, if they have moved; may be repeated."
        ),
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", metavar="URL", help="Where the autoencoder is, if it has moved.")
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(
            "--decode",
            metavar="N",
            min=0,
            help="Samples to decode and hold against their pictures; 0 = none. Default: 8, if the pictures are there.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="URL", help="Folder or s3:// prefix for verify.json and the contact sheet, verify.png."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not read the shards through: manifest, receipts and sizes only.")
    ] = False,
) -> None:
    """Hold a latent data set against its manifest, its checksums and its source pictures.

    Exit code 4 where a check fails. Nothing in the data set is changed.

    ```
    lathe verify s3://mine/latents/manifest.json --output verified
    ```
    """
    from pipeline.encode.verify.job import verify as run

    with ProgressLine("verify", "shards") as line:
        report = run(
            manifest,
            images=images or None,
            autoencoder=autoencoder,
            decode=decode,
            output=output,
            quick=quick,
            progress=line.update,
        )
    say(report)
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


def inspect(
    address: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="Shard, receipt, manifest, checkpoint, autoencoder, exported pipeline, or a folder of these.",
        ),
    ],
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=0, help="Of a shard, how many of the first samples are shown.")
    ] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON, with plain numbers.")] = False,
) -> None:
    """Print what stands at an address, for a person.

    Of shards and weights only the headers and the first samples are read.

    ```
    lathe inspect s3://mine/latents/00000.tar
    ```
    """
    from pipeline.operate.inspect import describe

    say(describe(address, samples=samples, as_json=as_json).rstrip())


def remove(
    manifest: ManifestUrl,
    keys: Annotated[str, typer.Option("--keys", metavar="FILE", help="One sample a line: KEY, or SHARD, a tab, KEY.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing, only tell what would go.")] = False,
) -> None:
    """Take samples down from a finished data set, without encoding anew.

    A later `lathe encode` leaves them out too. Stopped on the way, the same command goes on.

    ```
    lathe remove s3://mine/latents/manifest.json --keys takedown.txt --dry-run
    ```
    """
    from pipeline.encode.takedown.job import read_keys
    from pipeline.encode.takedown.job import remove as run

    with ProgressLine("remove", "shards") as line:
        result = run(manifest, read_keys(keys), dry_run=dry_run, progress=line.update)
    say(result)
