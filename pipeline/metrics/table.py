"""Every number Lathe reports, in one table.

A metric is known by its short key (`loss`) in calls and in the log, and by its full name (`lathe_train_loss`) to
Prometheus. Totals that are restored after a restart are gauges: a restored counter reads as a jump in `rate()`.
Counters are totals of one process alone, which begin at 0 with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Job = Literal["train", "first_stage", "encode"]
Subject = Job | Literal["storage"]
"""What a metric is of: a job, or the storage of any job's process."""
Kind = Literal["gauge", "counter", "histogram"]
Scope = Literal["global", "local"]

TRAINING: tuple[Subject, ...] = ("train", "first_stage")
TRAIN: tuple[Subject, ...] = ("train",)
FIRST_STAGE: tuple[Subject, ...] = ("first_stage",)
ENCODE: tuple[Subject, ...] = ("encode",)
STORAGE: tuple[Subject, ...] = ("storage",)

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
    """One metric.

    Args:
        key: its name in calls and in the log.
        unit: of its numbers.
        help: what it means.
        jobs: who reports it; `storage` = every process, whatever its job.
        labels: that tell its series apart.
        kind: `counter` for totals of one process, which begin at 0 with it.
        scope: `global` = told once for a job, by rank 0; `local` = by every rank or worker of itself.
    """

    key: str
    unit: str
    help: str
    jobs: tuple[Subject, ...]
    labels: tuple[str, ...] = ()
    kind: Kind = "gauge"
    scope: Scope = "global"

    def name(self, subject: Subject) -> str:
        """The full name as Prometheus has it: `lathe_train_loss`; of a counter with its `_total`."""
        return f"lathe_{subject}_{self.key}" + "_total" * (self.kind == "counter")

    def series(self, subject: Subject) -> tuple[str, ...]:
        """The names that queries can ask for: its own; of a histogram those with `_bucket`, `_sum` and `_count`."""
        name = self.name(subject)
        return tuple(f"{name}_{part}" for part in ("bucket", "sum", "count")) if self.kind == "histogram" else (name,)


def _local(key: str, unit: str, told: str, jobs: tuple[Subject, ...], *labels: str, kind: Kind = "gauge") -> Definition:
    return Definition(key, unit, told, jobs, labels, kind, "local")


_PROGRESS = (
    Definition("step", "steps", "Optimizer steps done, over all restarts", TRAINING),
    Definition("target_steps", "steps", "Optimizer steps after which the run is finished", TRAINING),
    Definition("epoch", "epochs", "Epochs of the data set seen, with fraction", TRAINING),
    Definition("samples_seen", "samples", "Samples trained on, over all restarts and ranks", TRAINING),
    Definition("last_step_timestamp_seconds", "s", "Unix time of the last step", TRAINING),
    Definition("world_size", "ranks", "Training processes", TRAIN),
    Definition("restarts", "starts", "Starts of the run before this one", TRAIN),
)
_LEARNING = (
    Definition("loss", "1", "Training loss, mean over the logging interval and all ranks", TRAINING),
    Definition(
        "noise_level_loss",
        "1",
        "Squared error of training samples, by range of noise levels, without weighting, mean over the logging interval"
        " and all ranks",
        TRAIN,
        ("noise_level",),
    ),
    Definition("reconstruction_loss", "1", "Reconstruction term of the loss", FIRST_STAGE),
    Definition("kl_loss", "nats", "KL divergence to the standard normal, per latent element", FIRST_STAGE),
    Definition("psnr_db", "dB", "Reconstruction PSNR of the last training batch", FIRST_STAGE),
    Definition("holdout_psnr_db", "dB", "Reconstruction PSNR of held-out pictures", FIRST_STAGE),
    Definition("learning_rate", "1", "Learning rate of the last step", TRAINING),
    Definition("gradient_norm", "1", "L2 norm of the last step's gradient before clipping", TRAINING),
    Definition("ema_decay", "1", "Decay of the last step, of each average of the weights", TRAIN, ("average",)),
    Definition("loss_scale", "1", "What the loss is multiplied by, in float16 alone", TRAIN),
    Definition("skipped_steps", "steps", "Steps skipped because loss or gradient was not finite", TRAIN),
    Definition("spikes", "values", "Logged losses and gradient norms far beyond the usual, of this start", TRAIN),
    Definition("skipped_blocks", "blocks", "Damaged blocks of latents that do not count, of rank 0", TRAIN),
)
_SPEED = (
    Definition("step_seconds", "s", "Wall time of a step, mean over the logging interval", TRAINING),
    Definition("data_wait_seconds", "s", "Part of a step that waits for its batch, of rank 0", TRAIN),
    Definition(
        "ranks_wait_seconds", "s", "Part of a step that waits until other ranks have their data, of rank 0", TRAIN
    ),
    Definition("forward_backward_seconds", "s", "Part of a step that computes losses and gradients, of rank 0", TRAIN),
    Definition("optimizer_seconds", "s", "Part of a step that updates weights and averages, of rank 0", TRAIN),
    Definition("logging_seconds", "s", "Part of a step that reduces and tells its numbers, of rank 0", TRAIN),
    Definition("images_per_second", "images/s", "Images trained on per second, over all ranks", TRAINING),
    Definition("images_per_second_per_device", "images/s", "Images trained on per second, by one rank", TRAIN),
    Definition(
        "mfu_ratio",
        "1",
        "Share of the devices' peak that goes into the model's own floating point operations; absent where the peak is"
        " not known",
        TRAIN,
    ),
    Definition(
        "straggler_ratio",
        "1",
        "Slowest rank's own time for data and the forward pass, over the median rank's; in ZeRO-3, where all wait for"
        " each other in that pass, only data tell them apart",
        TRAIN,
    ),
    Definition("slowest_rank", "1", "Rank whose own time for data and the forward pass is longest", TRAIN),
)
_CHECKPOINTS = (
    Definition("checkpoint_seconds", "s", "Wall time of the last checkpoint, until it was stored", TRAINING),
    Definition("checkpoint_stall_seconds", "s", "Time that training stood still for the last checkpoint", TRAIN),
    Definition("checkpoint_failures", "saves", "Checkpoints and snapshots of this start that failed", TRAIN),
    Definition("checkpoint_bytes", "bytes", "Size of the last checkpoint, all files", TRAINING),
    Definition("checkpoint_step", "steps", "Step of the last complete checkpoint; 0 = there is none", TRAINING),
    Definition(
        "checkpoint_timestamp_seconds",
        "s",
        "Unix time at which the state of the last complete checkpoint was taken",
        TRAINING,
    ),
)
_VALIDATION = (
    Definition("validation_loss", "1", "Loss of held-out samples at fixed noise and times", TRAIN, ("weights",)),
    Definition(
        "validation_level_loss",
        "1",
        "Squared error of held-out samples, by range of noise levels, without weighting",
        TRAIN,
        ("weights", "noise_level"),
    ),
    Definition(
        "validation_bound",
        "bits/dimension",
        "Variational bound on the negative log-likelihood of held-out latents",
        TRAIN,
        ("weights",),
    ),
    Definition("validation_seconds", "s", "Wall time of the last validation, without its pictures", TRAIN),
)
_RANKS = (
    _local("rank_step", "steps", "Step that this rank has begun last", TRAIN),
    _local("rank_last_step_timestamp_seconds", "s", "Unix time at which this rank began its last step", TRAIN),
    _local("rank_data_wait_seconds", "s", "Part of a step that waits for this rank's batch", TRAIN),
    _local("rank_forward_backward_seconds", "s", "Part of a step in which this rank computes", TRAIN),
    _local("device_memory_bytes", "bytes", "Memory of this rank's GPU that tensors take", TRAIN),
    _local("device_memory_peak_bytes", "bytes", "Most of it in the logging interval", TRAIN),
    _local("host_memory_available_bytes", "bytes", "Memory of this host that is free or can be freed", TRAIN),
    _local("resident_memory_bytes", "bytes", "Resident memory of this process", (*TRAINING, *ENCODE)),
)
_ENCODING = (
    _local("images", "images", "Images encoded", ENCODE, kind="counter"),
    _local("rejects", "samples", "Samples that could not be used, by reason", ENCODE, "reason", kind="counter"),
    _local("filtered", "samples", "Samples that nobody wanted, by reason", ENCODE, "reason", kind="counter"),
    _local("read_bytes", "bytes", "Bytes of source shards read", ENCODE, kind="counter"),
    _local("written_bytes", "bytes", "Bytes of latent shards stored", ENCODE, kind="counter"),
    _local("images_per_second", "images/s", "Images that this worker encoded per second, last 30 s", ENCODE),
    _local("shards_done", "shards", "Source shards of this worker that are done, over all restarts", ENCODE),
    _local("target_shards", "shards", "Source shards of this worker", ENCODE),
    _local("eta_seconds", "s", "Time until this worker is done, by bytes of source; absent until it is known", ENCODE),
    _local("busy_ratio", "1", "Share of the last 30 s that a stage worked, of all its threads", ENCODE, "stage"),
    _local("last_commit_timestamp_seconds", "s", "Unix time of the last source shard that was done", ENCODE),
    _local("finished", "1", "1 once all of this worker's shards are done", ENCODE),
)
_STORAGE = (
    _local("requests", "requests", "Requests, with those repeated", STORAGE, "operation", kind="counter"),
    _local("retries", "requests", "Requests that were repeated", STORAGE, kind="counter"),
    _local("errors", "requests", "Requests given up, by what was wrong", STORAGE, "kind", kind="counter"),
    _local("read_bytes", "bytes", "Bytes read", STORAGE, kind="counter"),
    _local("written_bytes", "bytes", "Bytes written", STORAGE, kind="counter"),
    _local("request_seconds", "s", "Wall time of a request", STORAGE, "operation", kind="histogram"),
)

DEFINITIONS = (
    *_PROGRESS,
    *_LEARNING,
    *_SPEED,
    *_CHECKPOINTS,
    *_VALIDATION,
    *_RANKS,
    *_ENCODING,
    *_STORAGE,
)
"""All of them, by what they tell of."""
