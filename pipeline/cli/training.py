"""Commands about models: train-vae, train, ema, sample, evaluate, export."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import Annotated

import typer

from pipeline import runfile
from pipeline.cli.arguments import Config, Overrides
from pipeline.config import EvaluateConfig, ExportConfig, FirstStageConfig, SampleConfig, TrainConfig
from pipeline.console import ProgressLine, say
from pipeline.stopping import PromptStop


def train_vae(config: Config, overrides: Overrides = None) -> None:
    """Train the first stage: the autoencoder that turns pictures into latents and back.

    Not needed where a pretrained one fits: give `lathe encode` its folder or hub id.
    Stopped or killed, the same command goes on from the last checkpoint.

    ```
    lathe train-vae configs/demo/train-vae.yaml root=my-run
    ```
    """
    settings = runfile.load(FirstStageConfig, config, overrides)
    from pipeline.train.first_stage import fit_first_stage

    with PromptStop(), ProgressLine("train-vae", "steps") as line:
        result = fit_first_stage(settings, line.update)
    say(result)


def train(
    config: Config,
    overrides: Overrides = None,
    print_engine: Annotated[
        int | None,
        typer.Option(
            "--print-engine",
            metavar="RANKS",
            min=1,
            help="Print the engine's whole configuration for so many ranks, DeepSpeed's own, and do nothing else.",
        ),
    ] = None,
) -> None:
    """Train the text-to-image model on latent shards.

    Stopped or killed, the same command goes on from the last checkpoint.

    ```
    lathe train configs/demo/train.yaml root=my-run
    lathe train configs/demo/train.yaml --print-engine 64  # is it what I meant?
    launchers/accelerate.sh configs/demo/train.yaml root=my-run  # several ranks
    ```
    """
    settings = runfile.load(TrainConfig, config, overrides)
    with nullcontext() if "RANK" in os.environ else PromptStop():  # a launcher tells how its ranks ended
        from pipeline.train.telling import engine_configuration
        from pipeline.train.trainer import fit

        if print_engine:
            say(json.dumps(engine_configuration(settings, print_engine), indent=1))
            return
        fit(settings)


def ema(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output of a training that had `ema.snapshot_every`.")],
    sigma_rel: Annotated[
        float,
        typer.Option(
            "--sigma-rel", metavar="X", help="Length of the average as a share of the training: 0.05, 0.1, ..."
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", metavar="URL", help="Folder or s3:// prefix that the average goes to.")
    ],
    at: Annotated[
        int | None,
        typer.Option("--at", metavar="STEP", help="The step that it is of; one with a snapshot. Default: the newest."),
    ] = None,
) -> None:
    """Make an average of the weights of any length, after the training, from its snapshots.

    The result is sampled, evaluated and exported like a run (`run=URL`). Nothing in the run is changed.

    ```
    lathe ema my-run/run --sigma-rel 0.07 --output my-run/ema-07
    ```
    """
    from pipeline.train.post_hoc import reconstruct

    with ProgressLine("ema", "snapshots") as line:
        result = reconstruct(run, sigma_rel, output, at, line.update)
    say(result)


def sample(config: Config, overrides: Overrides = None) -> None:
    """Make pictures for prompts, from averaged weights of a training run.

    They go to `output`, with a contact sheet. `weights` chooses another average than the first.

    ```
    lathe sample configs/demo/sample.yaml root=my-run 'prompts=[red heart]'
    ```
    """
    settings = runfile.load(SampleConfig, config, overrides)
    from pipeline.sample import sample as run

    with ProgressLine("sample", "pictures") as line:
        result = run(settings, line.update)
    say(result)


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
    say(result)


def export(config: Config, overrides: Overrides = None) -> None:
    """Write a training run as a folder that diffusers opens, with no code of Lathe behind it.

    It holds averaged weights, see `weights`, and opens with `StableDiffusionPipeline.from_pretrained(FOLDER)`.
    An output that holds anything but an earlier export of this run is refused.

    ```
    lathe export configs/demo/export.yaml root=my-run
    ```
    """
    settings = runfile.load(ExportConfig, config, overrides)
    from pipeline.export.job import export as run

    say(run(settings))
