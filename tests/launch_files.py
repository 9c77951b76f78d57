"""Run files to be launched, and submissions of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.config import SiteConfig
from pipeline.operate.launch import submissions
from pipeline.operate.launch.stages import read_pipeline

FILES: dict[str, dict[str, Any]] = {
    "encode": {
        "images": {"shards": "${root}/images", "resolution": 64},
        "autoencoder": "${root}/vae",
        "output": "${root}/latents",
    },
    "train": {"manifest": "${root}/latents/manifest.json", "output": "${root}/run"},
    "export": {"run": "${root}/run", "autoencoder": "${root}/vae", "output": "${root}/export"},
}
STAGES: dict[str, dict[str, Any]] = {
    "encode": {"config": "encode.yaml", "tasks": 8, "at_once": 3},
    "learn": {"config": "train.yaml", "nodes": 4, "set": {"steps": 7, "optimizer": {"learning_rate": 0.5}}},
    "export": {"config": "export.yaml"},
}

JOB = "JobId={} ArrayJobId=5 JobName={} UserId=me(1) JobState={} Reason={} Restarts={} RunTime=00:01:02 NodeList=n[1-2] ExitCode={} Comment=JobState=RUNNING\n"  # noqa: E501
"""What scontrol says of a job."""


def write_run_files(folder: Path) -> None:
    """`encode.yaml`, `train.yaml`, `export.yaml`, and a pipeline of them, `pipe line.yaml`."""
    for job, fields in FILES.items():
        (folder / f"{job}.yaml").write_text(yaml.safe_dump({"job": job, "root": "r", **fields}))
    tree = {"job": "launch", "root": "s3://bucket/run", "stages": STAGES}
    (folder / "pipe line.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def site(**fields: Any) -> SiteConfig:
    """A cluster's settings."""
    return SiteConfig.model_validate(fields)


def written(*arguments: str, parent: Path | None = None) -> submissions.Submission:
    """A submission to SLURM of which nothing was submitted yet."""
    pipeline = read_pipeline(arguments)
    submission = submissions.plan(pipeline, "slurm", parent, Path.cwd())
    submissions.write(submission, pipeline)
    return submission
