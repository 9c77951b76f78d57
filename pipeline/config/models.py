"""Geometry of autoencoder and UNet."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Positive, Section, Widths

PER_LEVEL = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim", "only_cross_attention")
"""Fields of UNetConfig with one value, or one per level."""


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


class UNetConfig(Section):
    """Geometry of diffusers' UNet2DConditionModel; the latent and text widths come from manifest and text towers.

    Levels are counted from the full latent down. What has one value per level takes a single one for all as well.
    """

    pretrained: str | None = Field(
        None,
        min_length=1,
        description="start from this UNet: folder, s3:// prefix or hub id of diffusers' UNet2DConditionModel, or of a"
        " pipeline that has one; its config.json decides the geometry. null = random weights",
    )
    block_out_channels: Widths = (64, 128)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    layers_per_block: Widths = (1,)
    transformer_layers_per_block: Widths = (1,)
    attention_head_dim: Widths = Field((4,), description="heads of each attention (diffusers' historical name)")
    only_cross_attention: tuple[bool, ...] = Field((False,), description="no attention among the latents")
    use_linear_projection: bool = Field(False, description="around transformers; SD 2 and SDXL have it")
    upcast_attention: bool = Field(False, description="attention scores in float32; SD 2.1 has it")
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    norm_num_groups: Count = 32
    norm_eps: Positive = 1e-5
    addition_embed_type: Literal["text_time"] | None = Field(
        None, description="text_time: sizes, crop and pooled text are shown with the time, as in SDXL"
    )
    addition_time_embed_dim: Count = Field(256, description="text_time: width of the code of each of six numbers")

    @property
    def levels(self) -> int:
        """How many; each but the last halves the latent."""
        return len(self.block_out_channels)

    def by_level(self, field: str) -> tuple[Any, ...]:
        """A field's values, one per level."""
        value: tuple[Any, ...] = getattr(self, field)
        return value * self.levels if len(value) == 1 else value

    @field_validator(*PER_LEVEL, mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _levels_agree(self) -> UNetConfig:
        lengths = {self.levels, len(self.down_block_types), len(self.up_block_types)}
        if len(lengths) != 1:
            raise ValueError("block_out_channels, down_block_types and up_block_types must have the same length")
        for field in PER_LEVEL:
            if len(found := self.by_level(field)) != self.levels:
                raise ValueError(f"{field}: {len(found)} values for {self.levels} levels; give one, or one per level")
        for width, heads in zip(self.block_out_channels, self.by_level("attention_head_dim"), strict=True):
            if width % self.norm_num_groups or width % heads:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of norm_num_groups={self.norm_num_groups}"
                    f" and of attention_head_dim={heads}"
                )
        blocks = (*self.down_block_types, self.mid_block_type or "", *self.up_block_types)
        if not any("CrossAttn" in block for block in blocks):
            raise ValueError("down_block_types: no block looks at the text; set one to CrossAttnDownBlock2D")
        return self
