"""One run file per command."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from pipeline.config.base import Count, Fraction, Positive, Section, Seed, Threads, Words
from pipeline.config.images import EncodeImagesConfig, ImagesConfig
from pipeline.config.latents import DataSetConfig, LoaderConfig
from pipeline.config.models import AutoencoderModelConfig, UNetConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.sampling import SamplingConfig
from pipeline.config.site import SlurmConfig
from pipeline.config.text import EncodeTextConfig, TextConfig, TowerConfig
from pipeline.config.training import (
    CheckpointConfig,
    EMAConfig,
    EngineConfig,
    JointOptimizerConfig,
    MetricsConfig,
    OptimizerConfig,
    TrackedMetricsConfig,
    TrainCheckpointConfig,
    TrainMetricsConfig,
)
from pipeline.config.validation import RAW, ValidationConfig

TOWERS = (
    "the run's frozen text towers (text.towers of the encode run file), if its own run file does not name them, or they"
    " have moved"
)
WEIGHTS = "an average by its name in ema.averages, or raw for the weights themselves; empty = the first average"

StageName = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,12}[a-z0-9])?$")]


class RunConfig(Section):
    """What every run file has."""

    root: str = Field("", description="a folder or s3:// prefix that other fields may name as ${root}")


class PackConfig(RunConfig):
    """`lathe pack`: a folder or a table of pictures and captions into WebDataset image shards."""

    job: Literal["pack"] = "pack"
    source: str = Field(
        description="local folder: NAME.png with NAME.txt, or metadata.jsonl / metadata.csv (file_name, text); or a"
        " table, or a pattern of tables: .csv, .tsv, .jsonl, .parquet"
    )
    output: str = Field(description="folder or s3:// prefix the shards go to")
    samples_per_shard: Count = 1000
    image_column: str = Field(
        "image", description="of a table: paths, absolute or relative to the table, or in Parquet the pictures' bytes"
    )
    caption_column: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "caption", description="of a table: the captions, a text or a list of texts; or several such columns"
    )
    key_column: str | None = Field(
        None, description="of a table: the samples' keys; null = the pictures' paths, or the rows' numbers"
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="what a missing or unusable picture or caption does; skip counts them by reason"
    )
    attribution: Words = Field("", description="whom the pictures are by, under which licence; kept beside the shards")


class FirstStageConfig(RunConfig):
    """`lathe train-vae`: the first-stage autoencoder."""

    job: Literal["train-vae"] = "train-vae"
    images: ImagesConfig
    output: str = Field(description="folder or s3:// prefix for the autoencoder, in diffusers' format")
    model: AutoencoderModelConfig = AutoencoderModelConfig()
    steps: Count = 2000
    batch_size: Count = 16
    optimizer: OptimizerConfig = OptimizerConfig()
    kernel_learning_rate: Positive = Field(
        0.01, description="peak rate of Muon, which trains the inner kernels; `optimizer` trains the rest with AdamW"
    )
    l1_weight: float = Field(1.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    l2_weight: float = Field(4.0, ge=0, description="weight of their mean squared error")
    kl_weight: float = Field(1e-5, ge=0, description="weight of the KL term, per latent element")
    flip: bool = Field(True, description="mirror every second picture at random")
    ema_decay: Fraction = 0.995
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0
    threads: Threads | None = Field(None, description="CPU threads; null = torch's choice")
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: TrackedMetricsConfig = TrackedMetricsConfig()
    log_every: Count = 20

    @model_validator(mode="after")
    def _levels_halve(self) -> FirstStageConfig:
        factor = 2 ** (len(self.model.block_out_channels) - 1)
        if self.images.resolution % factor:
            raise ValueError(
                f"images.resolution: {self.images.resolution} is not a multiple of {factor}, by which the levels of"
                " model.block_out_channels divide it"
            )
        return self


class EncodeConfig(RunConfig):
    """`lathe encode`: image shards to latent shards and a manifest."""

    job: Literal["encode"] = "encode"
    images: EncodeImagesConfig
    autoencoder: str = Field(description="folder, s3:// prefix or hub id of a diffusers AutoencoderKL")
    output: str = Field(description="folder or s3:// prefix for latent shards, receipts and manifest")
    text: EncodeTextConfig = EncodeTextConfig()
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="in which the autoencoder runs; what is not finite is encoded again in float32"
    )
    slicing: bool = Field(False, description="encode the pictures of a batch one by one, to save memory")
    tiling: bool = Field(False, description="encode large pictures in overlapping tiles, to save memory")
    compile: bool = Field(False, description="torch.compile the autoencoder; pays on GPUs and for long jobs")
    batch_size: Count = 32
    block_samples: Count = Field(64, description="samples per checksummed block, the unit the trainer reads")
    max_reject_rate: Fraction = Field(0.05, description="share of unusable samples past which the job fails")
    threads: Threads | None = Field(None, description="CPU threads of the models; null = torch's choice")
    decode_threads: Threads | None = Field(
        None, description="threads that decode pictures; null = the cores that this process may use"
    )
    metrics: MetricsConfig = MetricsConfig()


class InitFromConfig(Section):
    """The weights that a new run begins with: those of another run of the same geometry."""

    run: str = Field(
        min_length=1, description="a training run's output, one checkpoint in it, or what `lathe ema` made"
    )
    weights: str = Field("", description="an average by its name there, or raw; empty = the first average")


class TrainConfig(RunConfig):
    """`lathe train`: latent shards to a text-to-image diffusion model."""

    job: Literal["train"] = "train"
    manifest: str = Field("", description="manifest.json of the latents; of several data sets, set `datasets`")
    datasets: tuple[DataSetConfig, ...] = Field((), description="several data sets, or a part of one, for `manifest`")
    output: str = Field(description="folder or s3:// prefix for checkpoints and the metrics log")
    init_from: InitFromConfig | None = Field(
        None,
        description="weights of another run to begin with, at step 0 with a fresh optimizer; a run that has checkpoints"
        " of its own goes on from those",
    )
    restart_order: bool = Field(
        False,
        description="go on although the checkpoint was trained on other samples, since data grew, or were taken down:"
        " the order begins anew with the samples of now; false = refuse",
    )
    loader: LoaderConfig = LoaderConfig()
    normalisation: Literal["whiten", "scaling_factor"] = Field(
        "whiten",
        description="what latents are brought to: mean 0 and variance 1 by channel; or by the autoencoder's own shift"
        " and scale, as diffusers' pretrained UNets know them",
    )
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: JointOptimizerConfig = JointOptimizerConfig()
    ema: EMAConfig = EMAConfig()
    engine: EngineConfig = EngineConfig()
    steps: Count = 2000
    global_batch: Count = Field(64, description="samples per optimizer step, over all ranks")
    shuffle_window: Count = Field(256, description="samples shuffled together within each run of an epoch")
    seed: Seed = 0
    checkpoint: TrainCheckpointConfig = TrainCheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    metrics: TrainMetricsConfig = TrainMetricsConfig()
    log_every: Count = 20

    @property
    def sources(self) -> tuple[DataSetConfig, ...]:
        """The data sets, one or several."""
        return self.datasets or (DataSetConfig(manifest=self.manifest),)

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainConfig:
        if not self.manifest and not self.datasets:
            raise ValueError("manifest: missing; set it to a manifest.json, or set datasets to several")
        if self.manifest and self.datasets:
            raise ValueError("manifest: given, and datasets too; keep one of the two")
        manifests = [source.manifest for source in self.datasets]
        for place, manifest in enumerate(manifests):
            if manifest in manifests[:place]:
                raise ValueError(f"datasets.{place}.manifest: {manifest} is named twice; leave one out")
        if self.unet.pretrained is not None and self.init_from is not None:
            raise ValueError("unet.pretrained: given, and init_from too; keep one of the two to begin with")
        if self.text.mode != "joint" and self.optimizer.text_learning_rate_ratio != 1.0:
            raise ValueError(
                f"optimizer.text_learning_rate_ratio: text.mode={self.text.mode} trains no text tower; leave it out"
            )
        weightless = [place for place, source in enumerate(self.datasets) if source.weight is None]
        if 0 < len(weightless) < len(manifests):
            raise ValueError(f"datasets.{weightless[0]}.weight: missing; give every data set a weight, or none")
        return self

    @model_validator(mode="after")
    def _validated_weights_are_there(self) -> TrainConfig:
        there = [average.name for average in self.ema.averages] + [RAW]
        for place, name in enumerate(self.validation.weights or ()):
            if name not in there:
                raise ValueError(
                    f"validation.weights.{place}: {name} is no average in ema.averages; set {' or '.join(there)}"
                )
        return self


class GenerateConfig(SamplingConfig, RunConfig):
    """What every command has that makes pictures from a trained model."""

    run: str = Field(description="the training run's output, one checkpoint in it, or what `lathe ema` made of it")
    weights: str = Field("", description=WEIGHTS)
    towers: tuple[TowerConfig, ...] = Field((), description=TOWERS)
    autoencoder: str = Field(description="folder, s3:// prefix or hub id of the autoencoder the latents came from")
    batch_size: Count = 64
    seed: Seed = 0
    threads: Threads | None = Field(None, description="CPU threads; null = torch's choice")


class SampleConfig(GenerateConfig):
    """`lathe sample`: prompts to pictures, from the averaged weights of a checkpoint."""

    job: Literal["sample"] = "sample"
    prompts: tuple[Words, ...] = Field(min_length=1)
    output: str = Field(description="folder or s3:// prefix for the pictures and their contact sheet")


class EvaluateConfig(GenerateConfig):
    """`lathe evaluate`: do pictures follow their prompts, what does the autoencoder lose, what of unseen captions."""

    job: Literal["evaluate"] = "evaluate"
    manifest: str = Field(description="manifest.json of the latents that the run was trained on")
    shards: str = Field(description="the image shards that they were encoded from")
    output: str = Field(description="folder or s3:// prefix for evaluation.json and the pictures")
    prompts: Count = Field(128, description="training captions drawn by `seed` for the retrieval score")
    holdout_pictures: Count = Field(256, description="held-out pictures that are scored, the first in the manifest")


class ExportConfig(RunConfig):
    """`lathe export`: a checkpoint to a folder that diffusers opens as a pipeline."""

    job: Literal["export"] = "export"
    run: str = Field(description="the training run's output, one checkpoint in it, or what `lathe ema` made of it")
    weights: str = Field("", description=WEIGHTS)
    towers: tuple[TowerConfig, ...] = Field((), description=TOWERS)
    autoencoder: str = Field(description="folder, s3:// prefix or hub id of the autoencoder the latents came from")
    output: str = Field(description="folder or s3:// prefix for the pipeline")
    guidance: float = Field(2.0, ge=1, description="guidance scale noted in the exported model card")


class StageConfig(Section):
    """One command of a pipeline."""

    config: str = Field(min_length=1, description="its run file, beside the pipeline's, or a bundled one")
    set: dict[str, Any] = Field({}, description="fields of the run file, which win over it")
    nodes: Count = Field(1, description="of train: machines")
    tasks: Count = Field(1, description="of encode: workers")
    at_once: Count | None = Field(None, description="of encode: workers at the same time at most; null = all")
    slurm: SlurmConfig = Field(SlurmConfig(), description="what this stage asks of SLURM instead of the site's")


class LaunchConfig(RunConfig):
    """`lathe launch`: stages, each of which begins once the one before has finished; all are given `root`."""

    job: Literal["launch"] = "launch"
    stages: dict[StageName, StageConfig] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _stages_are_no_fields(cls, stages: dict[str, StageConfig]) -> dict[str, StageConfig]:
        for name in ("job", "root", "stages"):
            if name in stages:
                raise ValueError(f"{name} is a field of the pipeline; give the stage another name")
        for name in stages:  # each has files of its own in the submission's folder
            if name == "submission" or name.endswith("-finalize"):
                raise ValueError(f"{name} is a name that lathe launch uses itself; give the stage another name")
        return stages


JOBS: dict[str, type[RunConfig]] = {
    "pack": PackConfig,
    "train-vae": FirstStageConfig,
    "encode": EncodeConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "launch": LaunchConfig,
}
