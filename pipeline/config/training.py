"""With which optimizer a training run learns, on which ranks, and what it leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Fraction, Positive, Section, Threads


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
