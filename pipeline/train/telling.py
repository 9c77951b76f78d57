"""What `lathe train` says to a person; rank 0 alone speaks."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch

from pipeline.config import TrainConfig
from pipeline.console import tell
from pipeline.data.datasets import DataSets
from pipeline.runtime.engine import Engine, describe
from pipeline.runtime.process import Process


def say(text: str) -> None:
    """One line or more, from rank 0; also before there are ranks."""
    if os.environ.get("RANK", "0") == "0":
        tell(text)


def engine_configuration(config: TrainConfig, ranks: int) -> dict[str, Any]:
    """The engine's whole configuration, DeepSpeed's own for ZeRO; checked, on any machine.

    Raises:
        ConfigError: it cannot work.
    """
    clip = config.optimizer.gradient_clip
    return describe(config.engine, global_batch=config.global_batch, gradient_clip=clip, world_size=ranks)


def introduction(
    config: TrainConfig, sizes: Mapping[str, int], datasets: DataSets, ranks: Process, engine: Engine, *, step: int
) -> dict[str, str]:
    """What is trained on what, by what: lines for a table.

    Args:
        config: the run file.
        sizes: parameters of the parts "unet" and, where one is trained, "text".
        datasets: the latents.
        ranks: this rank among the others.
        engine: that trains.
        step: steps done.
    """
    manifest, sets = datasets.manifests[0], len(datasets.manifests)
    channels, side = manifest.latent_channels, manifest.base_side
    parts = [f"UNet {sizes['unet'] / 1e6:.2f} M"]
    parts += [f"text tower {sizes['text'] / 1e6:.2f} M"] if "text" in sizes else []
    parts += [f"{config.text.mode} text"] if config.text.mode != "joint" else []
    shapes = len({stream.bucket for stream in datasets.streams})
    epochs = config.steps * config.global_batch / datasets.samples
    return {
        "parameters": ", ".join(parts),
        "samples": f"{datasets.samples:,} of {channels}x{side}x{side}"
        + (f" and shapes like it, {shapes} in all" if shapes > 1 else "")
        + (f", from {sets} data sets" if sets > 1 else ""),
        "steps": f"{step} to {config.steps} of {config.global_batch} samples, {epochs:.1f} epochs",
        "ranks": f"{ranks.world_size} on {ranks.device.type}, {torch.get_num_threads()} threads each",
        "engine": f"{engine} (checked)" + (f", {engine.accumulation} micro batches a step" * (engine.accumulation > 1)),
    }


def conclusion(where: str, step: int, stopped_by: int) -> str:
    """How a run ended, after `step` steps, with its last checkpoint at `where`; by a signal, or by none (0)."""
    if not stopped_by:
        return f"finished: {where}"
    how = f"stopped by {signal.Signals(stopped_by).name}"
    return f"{how} after step {step}; the same command goes on from {where}" if step else f"{how} before the first step"
