"""Every run file as a typed, validated, frozen model. `runfile` reads them from YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Byte = Annotated[int, Field(ge=0, le=255)]
Widths = Annotated[tuple[Count, ...], Field(min_length=1)]


class Section(BaseModel):
    """One section of a run file: unknown fields are refused, and infinity and NaN; values cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ShardsConfig(Section):
    """Which image shards are read, and what of each picture."""

    shards: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="image shards: a folder, a pattern such as s3://bucket/shards/*.tar, a .txt file that lists"
        " addresses, one a line, or several of these"
    )
    background: tuple[Byte, Byte, Byte] = Field((255, 255, 255), description="colour laid under transparent pixels")
    caption_field: str = Field("caption", description="field of KEY.json with the caption, where there is no KEY.txt")
    holdout: Fraction = Field(0.0, description="share of the pictures that is never trained on, chosen by hash of key")


class ImagesConfig(ShardsConfig):
    """Image shards, and the size that their pictures are brought to."""

    resolution: Count = Field(description="side of the square training pictures, in pixels")


class BucketsConfig(Section):
    """Aspect-ratio buckets: picture sizes of about resolution x resolution pixels, wide and tall ones too."""

    max_aspect: float = Field(2.0, ge=1, le=16, description="longest side over shortest side of the widest bucket")
    step: Count = Field(64, description="sides are multiples of so many pixels")


class FiltersConfig(Section):
    """Which pictures are wanted. What is left out is counted apart from rejects, and does not make the job fail."""

    min_side: Count | None = Field(None, description="pixels that the shorter side must have; null = any")
    max_aspect: float | None = Field(None, ge=1, description="longer over shorter side may be this at most; null = any")
    min_caption_chars: int = Field(0, ge=0, description="captions shorter than this are left out")
    max_caption_chars: Count | None = Field(None, description="captions longer than this are left out; null = any")
    where: str = Field(
        "",
        description="condition on the fields of KEY.json, for example: punsafe < 0.1 and pwatermark < 0.5"
        " (a picture without the field is left out)",
    )

    @model_validator(mode="after")
    def _limits_agree(self) -> FiltersConfig:
        if self.max_caption_chars is not None and self.max_caption_chars < self.min_caption_chars:
            raise ValueError(
                f"max_caption_chars: {self.max_caption_chars} is less than min_caption_chars={self.min_caption_chars}"
            )
        return self


class EncodeImagesConfig(ShardsConfig):
    """Image shards, and the sizes that their pictures are encoded at."""

    resolution: Count | Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="side of a square picture, in pixels; with buckets, the root of a picture's pixels. Of several,"
        " such as [256, 512], each gets its own sub-folder of output and its own manifest"
    )
    buckets: BucketsConfig | None = Field(None, description="aspect-ratio buckets; null = squares, cut from the centre")
    max_upscale: float = Field(
        2.0, ge=1, le=64, description="pictures that would have to grow more than this are left out"
    )
    flip: bool = Field(False, description="store the mirrored picture's latent too")
    filters: FiltersConfig = FiltersConfig()
    shard_name_parts: Count = Field(
        1, description="last parts of a shard's address that name it; 2 tells a/00000.tar from b/00000.tar"
    )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions as a tuple, one or several."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)

    @model_validator(mode="after")
    def _sizes_can_be(self) -> EncodeImagesConfig:
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ValueError(f"resolution: {list(self.resolutions)} names one twice")
        if self.buckets:
            for resolution in self.resolutions:
                if resolution < self.buckets.step:
                    raise ValueError(f"buckets.step: {self.buckets.step} is more than resolution={resolution}")
        return self


class AutoencoderModelConfig(Section):
    """Geometry of diffusers' AutoencoderKL. Each level but the last halves the side of the picture."""

    latent_channels: Count = 8
    block_out_channels: Widths = (16, 32, 64, 64)
    layers_per_block: Count = 1
    norm_num_groups: Count = 8
    mid_block_attention: bool = True

    @model_validator(mode="after")
    def _groups_divide(self) -> AutoencoderModelConfig:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of norm_num_groups={self.norm_num_groups}"
                )
        return self


class TowerConfig(Section):
    """A frozen text encoder of open_clip, and which of its outputs the UNet is to see."""

    name: str = Field("clip", pattern="^[a-z0-9_]+$", description="its name in files and manifest: KEY.text0.NAME.npy")
    model: str = Field(
        description="open_clip architecture (ViT-L-14), hf-hub:OWNER/NAME, or a folder with open_clip_config.json and"
        " open_clip_model.safetensors"
    )
    pretrained: str = Field(
        "", description="weights of an architecture: a tag of open_clip, or a .safetensors file; a folder has its own"
    )
    layer: Literal["last", "penultimate"] = Field("last", description="SD 1.5: last; SD 2 and SDXL: penultimate")
    final_norm: bool = Field(True, description="apply the tower's final norm to that layer; SDXL does not")
    pooled: bool = Field(False, description="store the projected end-of-text vector too, as SDXL's second tower needs")
    pad: Literal["zero", "end"] = Field(
        "zero", description="token behind the caption: open_clip's 0, or end of text (SD 1.5, SDXL's first tower)"
    )


class EncodeTextConfig(Section):
    """What is stored of captions: token ids (`joint`, `online`), or what frozen text towers make of them (`cached`)."""

    mode: Literal["joint", "online", "cached"] = Field(
        "joint", description="the tower is trained with the UNet, runs frozen while training, or runs now"
    )
    context_length: int = Field(77, ge=8, le=77, description="tokens a caption is padded or cut to")
    towers: tuple[TowerConfig, ...] = Field((), description="the frozen text encoders of online and cached")
    padding: Literal["full", "trimmed"] = Field(
        "full", description="cached: keep the whole context (stock pipelines need it), or the caption's own length"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="in which cached towers run")

    @model_validator(mode="after")
    def _towers_fit_the_mode(self) -> EncodeTextConfig:
        names = [tower.name for tower in self.towers]
        if self.mode == "joint" and names:
            raise ValueError("towers: joint trains its own tower; leave towers out, or set mode to cached or online")
        if self.mode != "joint" and not names:
            raise ValueError(f"towers: mode={self.mode} needs at least one, for example [{{model: ViT-L-14, ...}}]")
        if len(set(names)) < len(names):
            raise ValueError("towers: two have the same name; give each its own")
        if self.padding == "trimmed" and self.mode != "cached":
            raise ValueError(f"padding: trimmed is for mode=cached, not for {self.mode}")
        return self


class TextConfig(Section):
    """The text tower: open_clip's text transformer, trained together with the UNet (`joint`)."""

    mode: Literal["joint"] = "joint"
    width: Count = 128
    layers: Count = 2
    heads: Count = 4
    context_length: int = Field(77, ge=8, le=77, description="tokens a caption is padded or cut to")
    train_token_embedding: bool = Field(True, description="off: the table of token codes keeps its random start")
    token_embedding_std: Positive = Field(0.02, description="spread of that random start; positions get half of it")

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads={self.heads}")
        return self


class UNetConfig(Section):
    """Geometry of diffusers' UNet2DConditionModel; the latent and text widths come from manifest and text tower."""

    block_out_channels: Widths = (64, 128)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    layers_per_block: Count = 1
    transformer_layers_per_block: Count = 1
    attention_head_dim: Count = Field(4, description="heads of each attention (diffusers' historical name)")
    norm_num_groups: Count = 32

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetConfig:
        lengths = {len(self.block_out_channels), len(self.down_block_types), len(self.up_block_types)}
        if len(lengths) != 1:
            raise ValueError("block_out_channels, down_block_types and up_block_types must have the same length")
        for width in self.block_out_channels:
            if width % self.norm_num_groups or width % self.attention_head_dim:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of norm_num_groups={self.norm_num_groups}"
                    f" and of attention_head_dim={self.attention_head_dim}"
                )
        return self


class ObjectiveConfig(Section):
    """What the UNet learns: rectified flow (Liu et al. 2022), timesteps logit-normal (Esser et al. 2024, eq. 19)."""

    kind: Literal["rectified_flow"] = "rectified_flow"
    timestep_mean: float = 0.0
    timestep_std: Positive = 1.0
    caption_dropout: Fraction = Field(0.1, description="share of captions replaced by the empty one, for guidance")


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then cosine decay to `final_learning_rate_ratio` of the peak."""

    learning_rate: Positive = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    epsilon: Positive = 1e-8
    weight_decay: float = Field(0.01, ge=0, description="not applied to norms, biases and embeddings")
    warmup_steps: int = Field(50, ge=0)
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1)
    gradient_clip: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")


class EngineConfig(Section):
    """How the optimizer's state is cut over the ranks, and in which precision the network runs."""

    zero_stage: Literal[1, 2] = Field(2, description="DeepSpeed ZeRO stage")
    precision: Literal["float32", "bfloat16"] = "float32"
    world_size: Count | None = Field(None, description="ranks that must be there at start; null = any")
    threads_per_rank: Threads | None = Field(
        None, description="CPU threads of each rank; null = OMP_NUM_THREADS, or cores / local ranks"
    )
    timeout_seconds: float = Field(600.0, gt=0, le=1e7, description="a rank that is silent this long ends the others")


class MetricsConfig(Section):
    """Where numbers go: Prometheus for a scraper, JSON lines for the report."""

    prometheus: bool = True
    host: str = Field("127.0.0.1", description="address the metrics server binds to; 0.0.0.0 = every interface")
    port: int = Field(0, ge=0, le=65535, description="first port to try; 0 = one that is free")


class CheckpointConfig(Section):
    """When the run is saved, and how many checkpoints are kept."""

    every: Count = Field(200, description="steps between checkpoints; the last step is always saved")
    keep: Count = Field(2, description="newest checkpoints that are kept")


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
    attribution: str = Field("", description="whom the pictures are by, under which licence; kept beside the shards")


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
    metrics: MetricsConfig = MetricsConfig()
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


class TrainConfig(RunConfig):
    """`lathe train`: latent shards to a text-to-image diffusion model."""

    job: Literal["train"] = "train"
    manifest: str = Field(description="manifest.json of the latents")
    output: str = Field(description="folder or s3:// prefix for checkpoints and the metrics log")
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    ema_decay: Fraction = 0.999
    steps: Count = 2000
    global_batch: Count = Field(64, description="samples per optimizer step, over all ranks")
    shuffle_window: Count = Field(256, description="samples shuffled together within each run of an epoch")
    seed: Seed = 0
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    log_every: Count = 20


class GenerateConfig(RunConfig):
    """What every command has that makes pictures from a trained model."""

    run: str = Field(description="the training run's output, or one checkpoint in it")
    autoencoder: str = Field(description="folder, s3:// prefix or hub id of the autoencoder the latents came from")
    guidance: float = Field(2.0, ge=1, description="classifier-free guidance scale; 1 = off")
    steps: Count = Field(25, description="sampler steps")
    batch_size: Count = 64
    seed: Seed = 0
    threads: Threads | None = Field(None, description="CPU threads; null = torch's choice")


class SampleConfig(GenerateConfig):
    """`lathe sample`: prompts to pictures, from the EMA weights of a checkpoint."""

    job: Literal["sample"] = "sample"
    prompts: tuple[str, ...] = Field(min_length=1)
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
    run: str = Field(description="the training run's output, or one checkpoint in it")
    autoencoder: str = Field(description="folder, s3:// prefix or hub id of the autoencoder the latents came from")
    output: str = Field(description="folder or s3:// prefix for the pipeline")
    guidance: float = Field(2.0, ge=1, description="guidance scale noted in the exported model card")


JOBS: dict[str, type[RunConfig]] = {
    "pack": PackConfig,
    "train-vae": FirstStageConfig,
    "encode": EncodeConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
