"""The `lathe` command: parse, load the run file, call one function."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import __version__, runfile
from pipeline.config import (
    EncodeConfig,
    EvaluateConfig,
    ExportConfig,
    FirstStageConfig,
    PackConfig,
    SampleConfig,
    TrainConfig,
)
from pipeline.console import ProgressLine, printable, tell
from pipeline.errors import DataError, LatheError
from pipeline.stopping import SAID, PromptStop, Stopped


class _Group(TyperGroup):
    """Typer leaves without a word on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stop:  # it has told so
            raise typer.Exit(stop.exit_code) from stop
        except KeyboardInterrupt as stop:
            tell(SAID)
            raise typer.Exit(130) from stop


app = typer.Typer(
    name="lathe",
    cls=_Group,
    help="Image shards to latents, latents to text-to-image diffusion models.\n\n"
    "New here? `lathe demo` runs every stage on this machine and shows the pictures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    add_completion=False,
)

bench = typer.Typer(
    help="Measure this machine at one job, against what is possible and against the usual way.\n\n"
    "```\nlathe bench encode --json figures.json\n```",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(bench, name="bench")

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Run file in YAML, or a bundled one: see `lathe config`.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields to set, dotted: `optimizer.learning_rate=1e-4 steps=500`."),
]


ManifestUrl = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="Address of a data set's manifest.json, local or s3://.")
]


@app.command()
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


@app.command()
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
    _say(result)


@app.command("train-vae")
def train_vae(config: Config, overrides: Overrides = None) -> None:
    """Train the first stage: the autoencoder that turns pictures into latents and back.

    Not needed where a pretrained one fits: give `lathe encode` its folder or hub id.

    ```
    lathe train-vae configs/demo/train-vae.yaml root=my-run
    ```
    """
    settings = runfile.load(FirstStageConfig, config, overrides)
    from pipeline.train.first_stage import fit_first_stage

    with ProgressLine("train-vae", "steps") as line:
        result = fit_first_stage(settings, line.update)
    _say(result)


@app.command()
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
        _say(f"{which}manifest written: {counts}")


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
    _say(result)


@app.command()
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
    _say(report)
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


@app.command()
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

    _say(describe(address, samples=samples, as_json=as_json).rstrip())


@app.command()
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
    _say(result)


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train the text-to-image model on latent shards.

    Stopped or killed, the same command goes on from the last checkpoint.

    ```
    lathe train configs/demo/train.yaml root=my-run
    launchers/accelerate.sh configs/demo/train.yaml root=my-run  # several ranks
    ```
    """
    settings = runfile.load(TrainConfig, config, overrides)
    from pipeline.train.trainer import fit

    fit(settings)


@app.command()
def sample(config: Config, overrides: Overrides = None) -> None:
    """Make pictures for prompts, from the EMA weights of a training run.

    They go to `output`, with a contact sheet.

    ```
    lathe sample configs/demo/sample.yaml root=my-run 'prompts=[red heart]'
    ```
    """
    settings = runfile.load(SampleConfig, config, overrides)
    from pipeline.sample import sample as run

    with ProgressLine("sample", "pictures") as line:
        result = run(settings, line.update)
    _say(result)


@app.command()
def evaluate(config: Config, overrides: Overrides = None) -> None:
    """Score a training run: do its pictures follow their prompts, and what does the autoencoder lose.

    The scores go to `output` as evaluation.json.

    ```
    lathe evaluate configs/demo/evaluate.yaml root=my-run
    ```
    """
    settings = runfile.load(EvaluateConfig, config, overrides)
    from pipeline.evaluate.job import evaluate as run

    with ProgressLine("evaluate", "pictures") as line:
        result = run(settings, line.update)
    _say(result)


@app.command()
def export(config: Config, overrides: Overrides = None) -> None:
    """Write a training run as a folder that diffusers opens, with no code of Lathe behind it.

    It holds the EMA weights, and opens with `StableDiffusionPipeline.from_pretrained(FOLDER)`.

    ```
    lathe export configs/demo/export.yaml root=my-run
    ```
    """
    settings = runfile.load(ExportConfig, config, overrides)
    from pipeline.export import export as run

    _say(run(settings))


@bench.command("encode")
def bench_encode(
    root: Annotated[
        str,
        typer.Option("--root", metavar="URL", help="Below it a new folder is made and deleted. Default: a local one."),
    ] = "",
    size: Annotated[
        str, typer.Option("--size", help="On 2 cores `small` takes 4 minutes, `standard` 11, `large` hours.")
    ] = "standard",
    repeats: Annotated[
        int | None, typer.Option("--repeats", metavar="N", min=1, help="Rounds; the figures are their medians.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write every figure there, local or s3://.")
    ] = None,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE", help="Write a page in Markdown there, local or s3://.")
    ] = None,
) -> None:
    """Is the device ever idle while `lathe encode` works, and does memory grow with the data?

    The usual loop (fetch, decode, encode, write in turn) is measured beside it.

    ```
    lathe bench encode --json figures.json --report encode.md
    lathe bench encode --size small --root s3://mine/bench
    ```
    """
    from pipeline.operate.bench.encode import bench_encode as run
    from pipeline.operate.bench.encode import sized
    from pipeline.operate.bench.page import page, summary

    command = f"lathe bench encode --size {size}" + (f" --repeats {repeats}" if repeats else "")
    result = run(sized(size, root, repeats), tell)
    _say(summary(result).rstrip())
    if figures is not None:
        _write(figures, json.dumps(result, indent=1) + "\n")
    if report is not None:
        _write(report, page(result, command))


@app.command("config")
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
        _say("\n".join(runfile.bundled_configs()))
    else:
        _say(runfile.dump(runfile.load_any(config, overrides)).rstrip())


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        _say(__version__)
        raise typer.Exit


def _write(url: str, text: str) -> None:
    from pipeline.storage import open_store, split

    folder, name = split(url)
    open_store(folder).write(name, text.encode())


def _say(result: Any) -> None:
    print(printable(str(result)), flush=True)  # noqa: T201


class Warnings(logging.Handler):
    """Warnings go where stderr is at that moment: above the progress bar, which takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one warning."""
        tell(self.format(record))


def main() -> None:
    """Run the command line; a user's error ends it with one line, its remedy and the error's exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Warnings()])
    try:
        app(prog_name="lathe")
    except LatheError as error:
        from pipeline.runtime.launch import report

        error.message, error.remedy = (printable(said, one_line=True) for said in (error.message, error.remedy))
        if not report(error):  # a rank's launcher tells what all ranks meet once
            print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
            if error.remedy:
                print(f"  {error.remedy}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
