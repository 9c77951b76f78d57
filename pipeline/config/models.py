"""Geometry of autoencoder and UNet."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.base import Count, Section, Widths


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
