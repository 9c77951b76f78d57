"""Every run file as a typed, validated, frozen model. `runfile` reads them from YAML."""

from pipeline.config.base import Byte, Count, Fraction, Positive, Section, Seed, Threads, Widths
from pipeline.config.images import BucketsConfig, EncodeImagesConfig, FiltersConfig, ImagesConfig, ShardsConfig
from pipeline.config.jobs import (
    JOBS,
    EncodeConfig,
    EvaluateConfig,
    ExportConfig,
    FirstStageConfig,
    GenerateConfig,
    PackConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from pipeline.config.latents import DataSetConfig, LoaderConfig
from pipeline.config.models import AutoencoderModelConfig, UNetConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.sampling import SamplingConfig
from pipeline.config.text import EncodeTextConfig, TextConfig, TowerConfig
from pipeline.config.training import (
    SIGMA_REL,
    AverageConfig,
    CheckpointConfig,
    EMAConfig,
    EngineConfig,
    JointOptimizerConfig,
    LossScaleConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainCheckpointConfig,
    sigma_rel_problem,
)

__all__ = [
    "JOBS",
    "SIGMA_REL",
    "AutoencoderModelConfig",
    "AverageConfig",
    "BucketsConfig",
    "Byte",
    "CheckpointConfig",
    "Count",
    "DataSetConfig",
    "EMAConfig",
    "EncodeConfig",
    "EncodeImagesConfig",
    "EncodeTextConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FiltersConfig",
    "FirstStageConfig",
    "Fraction",
    "GenerateConfig",
    "ImagesConfig",
    "JointOptimizerConfig",
    "LoaderConfig",
    "LossScaleConfig",
    "MetricsConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PackConfig",
    "Positive",
    "RunConfig",
    "SampleConfig",
    "SamplingConfig",
    "Section",
    "Seed",
    "ShardsConfig",
    "TextConfig",
    "Threads",
    "TowerConfig",
    "TrainCheckpointConfig",
    "TrainConfig",
    "UNetConfig",
    "Widths",
    "sigma_rel_problem",
]
