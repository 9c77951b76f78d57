"""What a training run is measured by beside its own loss."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.base import Count, Section, Seed, Words
from pipeline.config.sampling import SamplingConfig

RAW = "raw"
"""What the weights themselves are called where averages have names."""


class ValidationConfig(Section):
    """Losses of held-out samples, and pictures of fixed prompts. What the figures mean: docs/validation.md."""

    every: Count | None = Field(
        None, description="steps between validations, which the last step has too; null = none at all"
    )
    samples: Count = Field(256, description="held-out samples, spread over all that there are")
    noise_levels: int = Field(
        8, ge=1, le=100, description="parts of the noise levels; each sample is tried once in each of them"
    )
    weights: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="whose losses: averages by their names in ema.averages, and raw for the weights themselves; null ="
        " the first average and raw",
    )
    seed: Seed = Field(0, description="of noise, times and pictures")
    prompts: tuple[Words, ...] = Field(
        (), description="a picture of each, by the first of `weights`; they stay the same over a run to be compared"
    )
    autoencoder: str = Field(
        "", description="for prompts: folder, s3:// prefix or hub id of the autoencoder the latents came from"
    )
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _settings_fit(self) -> ValidationConfig:
        if self.prompts and self.every is None:
            raise ValueError(
                "every: null, but prompts for its pictures; set it to a number of steps, or leave them out"
            )
        if self.prompts and not self.autoencoder:
            raise ValueError("autoencoder: missing, and prompts need it; set it to what the latents were encoded with")
        if self.autoencoder and not self.prompts:
            raise ValueError("prompts: none, but an autoencoder for them; give prompts, or leave autoencoder out")
        if self.sampling.sampler == "ode":
            raise ValueError(
                "sampling.sampler: ode asks the network more often on one rank than on another, which ranks that share"
                " it cannot; set euler, heun, ddim or dpm++"
            )
        for place, name in enumerate(self.weights or ()):
            if name in (self.weights or ())[:place]:
                raise ValueError(f"weights.{place}: {name} is named twice; leave one out")
        return self
