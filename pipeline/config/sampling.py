"""How a trained model's noise becomes pictures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Positive, Section


class SamplingConfig(Section):
    """Sampler, steps and guidance. What to choose: docs/sampling.md."""

    sampler: Literal["euler", "heun", "ddim", "dpm++", "ode"] = Field(
        "euler", description="ddim is euler that may draw noise anew; ode chooses its own steps"
    )
    steps: Count = Field(25, description="sampler steps; heun evaluates the network twice in each, ode ignores this")
    grid: Literal["uniform", "trailing", "karras", "log_snr"] | None = Field(
        None,
        description="how the steps are spread over the noise levels; null = as is usual: uniform for rectified_flow,"
        " trailing for ddpm, karras for edm",
    )
    eta: float = Field(0.0, ge=0, le=1, description="of ddim: noise that each step draws anew; 0 = none, 1 = as DDPM")
    tolerance: Positive | None = Field(
        None, description="of ode: error allowed in each of its steps, relative and absolute; null = 0.001"
    )
    guidance: float = Field(2.0, ge=1, description="classifier-free guidance scale; 1 = off")
    guidance_rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how far contrast is brought back to what it is without guidance; 0 = off, 0.7 is usual",
    )
    guidance_interval: tuple[float, float] | None = Field(
        None, description="noise levels sigma / alpha between which guidance acts, such as [0.3, 5]; null = all"
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> SamplingConfig:
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta: sampler={self.sampler} draws no noise; set 0, or sampler to ddim")
        if self.tolerance and self.sampler != "ode":
            raise ValueError(
                f"tolerance: sampler={self.sampler} makes the steps it is told; set null, or sampler to ode"
            )
        if self.sampler == "ode" and self.grid:
            raise ValueError(f"grid: {self.grid}, but sampler=ode chooses its own steps; set null")
        if self.guidance == 1 and (self.guidance_rescale or self.guidance_interval):
            field = "guidance_rescale" if self.guidance_rescale else "guidance_interval"
            raise ValueError(f"{field}: guidance=1 is no guidance; leave it out, or set guidance above 1")
        if self.guidance_interval:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise ValueError(f"guidance_interval: [{low:g}, {high:g}] is empty; give two numbers, 0 <= low < high")
        return self
