"""Outputs of runs, written without running anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from support import fingerprint, provenance

from pipeline.data import images
from pipeline.data.fold import fold
from pipeline.data.manifest import Block, BucketRange, Receipt, Reject, Statistics, canonical, pack_hashes

LEVELS = ("0_0.10-0.50", "1_0.50-0.90", "2_0.90-1.00")
NOW = 1_700_000_000.0
STARTS = [
    {
        "time": NOW,
        "step": 0,
        "world_size": 2,
        "device": "cpu",
        "versions": {"torch": "2.14.1"},
        "hardware": {"processor": "an abacus", "cores": 2},
    }
]


def log_lines(steps: int, *, every: int = 1, scale: float = 1.0, validated: int = 10) -> list[dict[str, Any]]:
    """Lines of a training that learns, each `every` steps, with a validation each `validated` lines."""
    lines: list[dict[str, Any]] = []
    for number, step in enumerate(range(every, steps + 1, every), 1):
        loss = scale * (0.3 + math.exp(-step / 30)) * (1 + 0.1 * math.sin(step))
        common = {"step": step, "time": NOW + step}
        lines.append(
            {
                **common,
                "loss": loss,
                "learning_rate": 1e-3,
                "gradient_norm": 1 / step,
                "images_per_second": 100.0 + step,
                "step_seconds": 0.5,
                "data_wait_seconds": 0.05,
                "epoch": step / 10,
                "samples_seen": step * 8,
                "skipped_steps": 0,
            }
        )
        if number % validated == 0:
            by_level = {level: loss * (1 + place) for place, level in enumerate(LEVELS)}
            lines.append(
                {
                    **common,
                    "validation_loss": {"main": loss, "raw": loss * 1.1},
                    "validation_level_loss": {"main": by_level, "raw": by_level},
                    "validation_seconds": 1.5,
                }
            )
    return lines


def write_log(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_training(folder: Path, steps: int = 60, *, target: int | None = None, **changes: Any) -> Path:
    """A training's output: log, run file, starts, checkpoints and pictures."""
    scale = changes.pop("scale", 1.0)
    write_log(folder, log_lines(steps, scale=scale))
    config = {"job": "train", "steps": target or steps, "output": str(folder), "optimizer": {"learning_rate": 1e-3}}
    config |= {"validation": {"every": 10, "prompts": ["a red <apple>"]}, **changes}
    (folder / "run.yaml").write_text(json.dumps(config))
    (folder / "starts.json").write_text(json.dumps(STARTS))
    for step in range(20, steps + 1, 20):
        checkpoint = folder / f"step-{step:08d}"
        checkpoint.mkdir()
        (checkpoint / "complete.json").write_text(json.dumps({"files": {}}))
    (folder / "samples").mkdir()
    for step in range(10, steps + 1, 10):
        pixels = np.full((16, 24, 3), 4 * step % 256, np.uint8)
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(images.contact_sheet([pixels], 1))
    return folder


def receipt(shard: int, rejects: int = 2) -> Receipt:
    """Of four samples, one of them held out."""
    return Receipt(
        shard=f"{shard:05d}.tar",
        source=f"{shard:05d}.tar",
        source_bytes=9,
        source_sha256="s",
        fingerprint=fingerprint().digest(),
        bytes=2**20,
        sha256="h",
        buckets=(BucketRange(bucket=(64, 64), train=(0, 3), holdout=(3, 4)),),
        blocks=(Block(first_sample=0, samples=4, offset=0, length=9, crc32=1),),
        keys=pack_hashes(range(4)),
        statistics=Statistics(count=2, sum=(1.0, 2.0), sum_squares=(3.0, 4.0), sum_variance=(1.0, 1.0)),
        rejects=(
            *(Reject(key=f"{shard}-{i}", reason="no_caption") for i in range(rejects)),
            Reject(key=f"{shard}-small", reason="filtered_min_side"),
        ),
        environment={"lathe": "0.1.0", "device": "an abacus"},
    )


def write_receipts(folder: Path, shards: Iterable[int]) -> Path:
    """What an encode job that goes on has stored."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        (folder / f"{shard:05d}.tar.receipt.json").write_bytes(receipt(shard).to_bytes())
    (folder / "encoding.json").write_bytes(canonical({"fingerprint": fingerprint().model_dump(mode="json")}))
    return folder


def write_encoded(folder: Path, shards: int = 3) -> Path:
    """What a finished one has."""
    receipts = [receipt(number) for number in range(shards)]
    write_receipts(folder, range(shards))
    (folder / "manifest.json").write_bytes(fold(receipts, provenance()).to_bytes())
    lines = ({"shard": r.source, "key": reject.key, "reason": reject.reason} for r in receipts for reject in r.rejects)
    (folder / "rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
