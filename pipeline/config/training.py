"""With which optimizer a training run learns, on which ranks, and what it leaves behind."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Fraction, Positive, Section, Threads

SIGMA_REL = (0.001, 0.2886)
"""Shortest and longest power function average. At 12^-0.5 all steps weigh the same, and no rising profile is longer. At
a thousandth of the training the exponent is 1000, and an average spans so few steps that a constant decay serves."""


def sigma_rel_problem(sigma_rel: float) -> str:
    """Why there is no power function average of that length; empty where there is."""
    shortest, longest = SIGMA_REL
    if shortest <= sigma_rel <= longest:
        return ""
    if 0 < sigma_rel < shortest:
        return (
            f"{sigma_rel:g} is below {shortest:g}: so short an average spans few steps, as one of constant decay does"
        )
    if sigma_rel > longest:
        return f"{sigma_rel:g} is above {longest:g}, where all steps of the training weigh the same"
    return f"{sigma_rel:g} is no share of the training"


class OptimizerConfig(Section):
    """AdamW; its learning rate warms up linearly, then falls by a schedule."""

    learning_rate: Positive = Field(1e-3, description="the peak")
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt", "edm2"] = Field(
        "cosine",
        description="shape after the warm-up: cosine and linear end with the run; edm2 falls as 1/sqrt(step)",
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    epsilon: Positive = 1e-8
    weight_decay: float = Field(0.01, ge=0, description="not applied to norms, biases and embeddings")
    warmup_steps: int = Field(50, ge=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="cosine, linear: the last rate / the peak")
    reference_steps: Count | None = Field(
        None,
        description="scale of inverse_sqrt (null = warmup_steps, or 10000 without) and t_ref of edm2 (null = 70000)",
    )
    gradient_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _the_schedule_uses_what_is_set(self) -> OptimizerConfig:
        ending, scaled = ("cosine", "linear"), ("inverse_sqrt", "edm2")
        if self.final_learning_rate_ratio and self.schedule not in ending:
            raise ValueError(
                f"final_learning_rate_ratio: schedule={self.schedule} has no last rate; set 0, or schedule to"
                f" {' or '.join(ending)}"
            )
        if self.reference_steps and self.schedule not in scaled:
            raise ValueError(
                f"reference_steps: schedule={self.schedule} has no such scale; set null, or schedule to"
                f" {' or '.join(scaled)}"
            )
        return self


class JointOptimizerConfig(OptimizerConfig):
    """The diffusion model's, whose text tower may learn at a rate of its own."""

    text_learning_rate_ratio: Positive = Field(1.0, description="rate of the text tower / rate of the UNet")


class AverageConfig(Section):
    """One moving average of the weights: of constant decay, or with the profile of a power function."""

    name: str = Field("main", pattern="^[a-z0-9_]+$", description="its name in checkpoints, and for `weights`")
    decay: Fraction | None = Field(
        None, description="constant, per step; warmed up as min(decay, (1 + step) / (10 + step))"
    )
    sigma_rel: float | None = Field(
        None,
        description="length as a share of the training so far (Karras et al. 2024), 0.001 to 0.2886: 0.05 and 0.1 are"
        " usual",
    )

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> AverageConfig:
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError(f"{self.name}: give decay or sigma_rel, one of the two")
        if self.name == "raw":
            raise ValueError("name: raw means the weights without an average; give another name")
        if self.sigma_rel is not None and (problem := sigma_rel_problem(self.sigma_rel)):
            raise ValueError(f"sigma_rel: {problem}; set one of {SIGMA_REL[0]:g} to {SIGMA_REL[1]:g}, or decay")
        return self


class EMAConfig(Section):
    """Moving averages of the weights, all float32 and made from the float32 weights; sampling takes the first."""

    averages: tuple[AverageConfig, ...] = (AverageConfig(decay=0.999),)
    snapshot_every: Count | None = Field(
        None,
        description="steps between snapshots of the averages with sigma_rel, from which `lathe ema` makes one of any"
        " length; the last step has one too; null = none",
    )
    snapshot_keep: Count | None = Field(None, description="newest snapshots that are kept; null = all, as one should")

    @model_validator(mode="after")
    def _averages_differ(self) -> EMAConfig:
        for values, what in (
            ([average.name for average in self.averages], "name"),
            ([average.sigma_rel for average in self.averages if average.sigma_rel], "sigma_rel"),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"averages: two have the same {what}; give each its own")
        if self.snapshot_every and not self.profiled:
            raise ValueError(
                "snapshot_every: snapshots are of averages with sigma_rel, and there is none; add to averages, for"
                " example, {name: short, sigma_rel: 0.05} and {name: long, sigma_rel: 0.1}"
            )
        if self.snapshot_keep and not self.snapshot_every:
            raise ValueError(
                f"snapshot_keep: {self.snapshot_keep}, but no snapshots are taken; set null, or snapshot_every to the"
                " steps between them"
            )
        return self

    @property
    def profiled(self) -> tuple[AverageConfig, ...]:
        """The averages with the profile of a power function."""
        return tuple(average for average in self.averages if average.sigma_rel is not None)


class LossScaleConfig(Section):
    """float16: the loss is multiplied by this, so that small gradients do not become 0; halved when they overflow."""

    initial_power: int = Field(16, ge=0, le=24, description="the first scale is 2 to this; it finds its size by itself")
    growth_interval: Count = Field(1000, description="steps without an overflow after which the scale is doubled")


class EngineConfig(Section):
    """How state is cut over the ranks, in which precision the network runs, and what saves memory or time."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="DeepSpeed ZeRO: 1 cuts the optimizer's state over the ranks, 2 gradients too, 3 weights too;"
        " 0 = plain DDP without DeepSpeed, every rank holding all: for one machine",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the working weights and the network; optimizer and averages are float32 in all"
    )
    loss_scale: LossScaleConfig = LossScaleConfig()
    accumulation: Count = Field(
        1, description="micro batches that a rank takes one after the other in each step, to save memory"
    )
    offload_optimizer: bool = Field(
        False, description="ZeRO: float32 weights, optimizer and averages in the host's memory, updated by its cores"
    )
    offload_parameters: bool = Field(
        False, description="ZeRO-3: working weights too in the host's memory, fetched layer by layer"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass rather than keep them; a third more compute"
    )
    channels_last: bool = Field(
        False, description="memory format of activations; often faster on GPUs, in low precision"
    )
    compile: bool = Field(False, description="torch.compile the network, but not in ZeRO-3; minutes at start, on GPUs")
    world_size: Count | None = Field(None, description="ranks that must be there at start; null = any")
    threads_per_rank: Threads | None = Field(
        None, description="CPU threads of each rank; null = OMP_NUM_THREADS, or the cores it may use / local ranks"
    )
    timeout_seconds: float = Field(600.0, gt=0, le=1e7, description="a rank that is silent this long ends the others")
    stall_seconds: float | None = Field(
        None,
        gt=0,
        description="without progress for so long, it is told which rank stands where; null = a fifth of"
        " timeout_seconds",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> EngineConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "offload_optimizer: true, but DDP keeps its optimizer on the device; set zero_stage to 1, 2 or 3"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters: true, but zero_stage {self.zero_stage} keeps whole weights; set zero_stage to 3"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile: true, but in ZeRO-3 torch compiles the hooks of every layer anew until it gives up; set"
                " zero_stage to 0, 1 or 2, or compile to false"
            )
        if self.stall_seconds and self.stall_seconds >= self.timeout_seconds:
            raise ValueError(
                f"stall_seconds: {self.stall_seconds:g}, but after timeout_seconds={self.timeout_seconds:g} the run has"
                " ended; set less, or null"
            )
        if self.loss_scale != LossScaleConfig() and self.precision != "float16":
            raise ValueError(
                f"loss_scale: set, but precision {self.precision} has none; set precision to float16, or leave it out"
            )
        return self


class MetricsConfig(Section):
    """Where numbers go: Prometheus for a scraper, JSON lines for the report."""

    prometheus: bool = True
    host: str = Field("127.0.0.1", description="address the metrics server binds to; 0.0.0.0 = every interface")
    port: int = Field(
        0, ge=0, le=65535, description="first port to try, plus the rank on its machine; 0 = one that is free"
    )
    run: str | None = Field(
        None, min_length=1, description="the run's name as Prometheus is told; null = the last part of its output"
    )
    discovery: str | None = Field(
        None, min_length=1, description="folder for a file of each process, by which Prometheus finds it; null = none"
    )
    pushgateway: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="a Pushgateway that is told every few seconds, http://HOST:PORT",
    )
    pushgateway_linger_seconds: float = Field(
        20.0, ge=0, le=3600, description="how long a finished job's last numbers stay there: longer than a scrape"
    )

    @field_validator("discovery")
    @classmethod
    def _is_a_path(cls, folder: str | None) -> str | None:
        if folder is not None and "\0" in folder:
            raise ValueError("no path has a NUL in it")
        return folder

    @field_validator("pushgateway")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None:
            try:
                parts = urlsplit(url)
                host, _ = (parts.hostname or "").encode("idna"), parts.port
            except ValueError as error:
                raise ValueError(f"no address: {error}") from error
            if not host:
                raise ValueError("no address: it names no host")
        return url


class WandbConfig(Section):
    """A run at Weights & Biases; keys and addresses of servers are taken from wandb's own environment."""

    project: str = Field(min_length=1)
    name: str | None = Field(None, description="of the run; null = wandb makes one up")
    entity: str | None = Field(None, description="user or team; null = wandb's default")
    group: str | None = Field(None, description="of runs that belong together")
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = Field("online", description="offline keeps it local, for `wandb sync`")


class TrackedMetricsConfig(MetricsConfig):
    """Of a training, whose numbers may go to trackers too."""

    tensorboard: bool | str = Field(
        False, description="write files for TensorBoard, to the output's folder `tensorboard` or to this one"
    )
    wandb: WandbConfig | None = Field(None, description="log to Weights & Biases, if wandb is installed; null = off")


class TrainMetricsConfig(TrackedMetricsConfig):
    """The diffusion model's."""

    peak_flops: Positive | None = Field(
        None, description="operations a second that one device can do; null = as is known of some GPUs"
    )


class CheckpointConfig(Section):
    """When the run is saved, and how many checkpoints are kept."""

    every: Count = Field(200, description="steps between checkpoints; the last step is always saved")
    keep: Count = Field(2, description="newest checkpoints that are kept")


class TrainCheckpointConfig(CheckpointConfig):
    """The diffusion model's, which are saved while training goes on."""

    keep_every: Count | None = Field(
        None, description="of each stretch of so many steps the first checkpoint is kept for good; null = of none"
    )
    max_failures: Count = Field(
        3, description="saves that may fail one after the other, as the store is full or away, before the run stops"
    )
