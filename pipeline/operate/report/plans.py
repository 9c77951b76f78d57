"""Which numbers of a log are drawn together, and how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A chart to be drawn where its numbers were logged."""

    title: str
    unit: str
    keys: Mapping[str, str]  # metric -> what its curve is called
    note: str = ""
    smooth: bool = True
    log_scale: bool = True
    scale: float = 1.0  # the values are divided by it
    share_of: str = ""  # ... or by another metric of the same line
    unless: float | None = None  # not drawn where all values are this one, which says nothing


LOSSES = (
    Plan("Loss", "loss", {"loss": "training", "validation_loss": "held out"}),
    Plan("Reconstruction loss", "loss", {"reconstruction_loss": "training"}),
    Plan("Reconstruction", "dB", {"psnr_db": "training batch", "holdout_psnr_db": "held out"}, log_scale=False),
    Plan("KL divergence", "nats per latent element", {"kl_loss": "training"}),
    Plan(
        "Variational bound",
        "bits per dimension",
        {"validation_bound": "held out"},
        log_scale=False,
    ),
)
OPTIMISATION = (
    Plan("Learning rate", "per step", {"learning_rate": "learning rate"}, smooth=False),
    Plan("Gradient norm", "norm before clipping", {"gradient_norm": "gradient norm"}),
    Plan("Decay of averages", "per step", {"ema_decay": "decay"}, smooth=False, log_scale=False),
    Plan("Loss scale", "factor", {"loss_scale": "loss scale"}, smooth=False),
    Plan(
        "Incidents",
        "count",
        {
            "skipped_steps": "skipped steps",
            "spikes": "spikes",
            "skipped_blocks": "skipped blocks",
            "restarts": "restarts",
            "checkpoint_failures": "failed saves",
        },
        "Steps that were not finite; values far beyond the usual and failed saves, of each start; damaged blocks of"
        " latents; starts before the one that goes on.",
        smooth=False,
        log_scale=False,
        unless=0.0,
    ),
)
THROUGHPUT = (
    Plan("Images per second", "images/s", {"images_per_second": "all ranks"}, log_scale=False),
    Plan(
        "Images per second and device",
        "images/s",
        {"images_per_second_per_device": "mean of the ranks"},
        log_scale=False,
    ),
    Plan(
        "Data wait",
        "% of a step",
        {"data_wait_seconds": "waits for data"},
        "The share of the time that steps waited for their batch.",
        log_scale=False,
        scale=0.01,
        share_of="step_seconds",
    ),
    Plan(
        "Parts of a step",
        "seconds",
        {
            "step_seconds": "whole",
            "forward_backward_seconds": "forward, backward",
            "optimizer_seconds": "optimizer",
            "data_wait_seconds": "data wait",
            "ranks_wait_seconds": "wait for ranks",
            "logging_seconds": "logging",
        },
    ),
    Plan("Model FLOPs utilisation", "% of the peak", {"mfu_ratio": "MFU"}, log_scale=False, scale=0.01),
    Plan("Slowest rank", "times the median", {"straggler_ratio": "slowest"}, log_scale=False, unless=1.0),
    Plan("Which rank is the slowest", "rank", {"slowest_rank": "rank"}, smooth=False, log_scale=False, unless=0.0),
    Plan(
        "Memory",
        "GiB",
        {
            "resident_memory_bytes": "process",
            "device_memory_bytes": "device",
            "device_memory_peak_bytes": "device, peak",
            "host_memory_available_bytes": "host, available",
        },
        smooth=False,
        log_scale=False,
        scale=2**30,
    ),
    Plan(
        "Beside the steps",
        "seconds",
        {
            "validation_seconds": "validation",
            "checkpoint_seconds": "checkpoint",
            "checkpoint_stall_seconds": "stall for a checkpoint",
        },
        smooth=False,
    ),
)
LEVELS = ("noise_level_loss", "validation_level_loss")
"""Losses by noise level, which have charts of their own."""
PLANNED = {key for plan in (*LOSSES, *OPTIMISATION, *THROUGHPUT) for key in plan.keys} | {
    "epoch",
    "target_steps",
    "samples_seen",
    "world_size",
    *LEVELS,
}
"""What has its place."""
