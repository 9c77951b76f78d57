"""Every number Lathe reports, in one table.

A metric is known by its short key (`loss`) in calls and in the log, and by its full name (`lathe_train_loss`) to
Prometheus. All are gauges: totals are restored after a restart, and a restored counter reads as a jump in `rate()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Job = Literal["train", "first_stage", "encode"]
TRAINING: tuple[Job, ...] = ("train", "first_stage")
ENCODE: tuple[Job, ...] = ("encode",)

Value = float | Mapping[str, "Value"]
"""A number; of a metric with labels, numbers by the first label's value, then by the second's."""


def flat(value: Value) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers of a value, each with its labels' values."""
    if not isinstance(value, Mapping):
        yield (), value
        return
    for label, inner in value.items():
        for labels, number in flat(inner):
            yield (label, *labels), number


@dataclass(frozen=True)
class Definition:
    """One metric: its key in calls and log, its unit, what it means, the jobs that report it, and its labels."""

    key: str
    unit: str
    help: str
    jobs: tuple[Job, ...]
    labels: tuple[str, ...] = ()

    def name(self, job: Job) -> str:
        """The full name that Prometheus knows, such as `lathe_train_loss`."""
        return f"lathe_{job}_{self.key}"


DEFINITIONS = (
    Definition("step", "steps", "Optimizer steps done, over all restarts", TRAINING),
    Definition("target_steps", "steps", "Optimizer steps after which the run is finished", TRAINING),
    Definition("epoch", "epochs", "Epochs of the data set seen, with fraction", TRAINING),
    Definition("samples_seen", "samples", "Samples trained on, over all restarts and ranks", TRAINING),
    Definition("loss", "1", "Training loss, mean over the logging interval and all ranks", TRAINING),
    Definition("reconstruction_loss", "1", "Reconstruction term of the loss", ("first_stage",)),
    Definition("kl_loss", "nats", "KL divergence to the standard normal, per latent element", ("first_stage",)),
    Definition("psnr_db", "dB", "Reconstruction PSNR of the last training batch", ("first_stage",)),
    Definition("holdout_psnr_db", "dB", "Reconstruction PSNR of held-out pictures", ("first_stage",)),
    Definition("learning_rate", "1", "Learning rate of the last step", TRAINING),
    Definition("gradient_norm", "1", "L2 norm of the last step's gradient before clipping", TRAINING),
    Definition("skipped_steps", "steps", "Steps skipped because loss or gradient was not finite", ("train",)),
    Definition("spikes", "values", "Logged losses and gradient norms far beyond the usual, of this start", ("train",)),
    Definition("skipped_blocks", "blocks", "Damaged blocks of latents that do not count, of rank 0", ("train",)),
    Definition("step_seconds", "s", "Wall time of a step, mean over the logging interval", TRAINING),
    Definition(
        "data_wait_seconds", "s", "Time a step waited for its batch, mean over the logging interval", ("train",)
    ),
    Definition("checkpoint_seconds", "s", "Wall time of the last checkpoint, until it was stored", TRAINING),
    Definition("checkpoint_stall_seconds", "s", "Time that training stood still for the last checkpoint", ("train",)),
    Definition("checkpoint_failures", "saves", "Checkpoints and snapshots of this start that failed", ("train",)),
    Definition("checkpoint_bytes", "bytes", "Size of the last checkpoint, all files", TRAINING),
    Definition("checkpoint_step", "steps", "Step of the last complete checkpoint", TRAINING),
    Definition("checkpoint_timestamp_seconds", "s", "Unix time of the last complete checkpoint", TRAINING),
    Definition("last_step_timestamp_seconds", "s", "Unix time of the last step that was logged", TRAINING),
    Definition("validation_loss", "1", "Loss of held-out samples at fixed noise and times", ("train",), ("weights",)),
    Definition(
        "validation_level_loss",
        "1",
        "Squared error of held-out samples, by range of noise levels, without weighting",
        ("train",),
        ("weights", "noise_level"),
    ),
    Definition(
        "validation_bound_bits",
        "bits/dimension",
        "Variational bound on the negative log-likelihood of held-out latents",
        ("train",),
        ("weights",),
    ),
    Definition("validation_seconds", "s", "Wall time of the last validation, without its pictures", ("train",)),
    Definition("world_size", "ranks", "Training processes", ("train",)),
    Definition("images_per_second", "images/s", "Images trained on per second, over all ranks", TRAINING),
    Definition("images", "images", "Images that this run of the worker has encoded", ENCODE),
    Definition("images_per_second", "images/s", "Images that this worker encoded per second, last 30 s", ENCODE),
    Definition("rejects", "samples", "Samples of this run that could not be used, by reason", ENCODE, ("reason",)),
    Definition("filtered", "samples", "Samples of this run that nobody wanted, by reason", ENCODE, ("reason",)),
    Definition("bytes_read", "bytes", "Bytes of source shards that this run of the worker has read", ENCODE),
    Definition("bytes_written", "bytes", "Bytes of latent shards that this run of the worker has stored", ENCODE),
    Definition("shards_done", "shards", "Source shards of this worker that are done, over all restarts", ENCODE),
    Definition("target_shards", "shards", "Source shards of this worker", ENCODE),
    Definition("eta_seconds", "s", "Time until this worker is done, by bytes of source; NaN = not known yet", ENCODE),
    Definition("busy_ratio", "1", "Share of the last 30 s that a stage worked, of all its threads", ENCODE, ("stage",)),
    Definition("storage_retries", "requests", "Requests to storage that this run of the worker repeated", ENCODE),
    Definition("last_commit_timestamp_seconds", "s", "Unix time of the last source shard that was done", ENCODE),
    Definition("resident_memory_bytes", "bytes", "Resident memory of this process", (*TRAINING, *ENCODE)),
)
