"""The text-conditioned UNet of diffusers, and the one module that the training engine wraps."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipeline.config import UNetConfig
from pipeline.errors import ConfigError
from pipeline.models.text import TextTower


def build(config: UNetConfig, latent_channels: int, latent_side: int, text_width: int) -> UNet2DConditionModel:
    """A new UNet with random weights.

    Args:
        config: its geometry.
        latent_channels: C of the latents.
        latent_side: h = w of the training latents; a stock pipeline takes its default picture size from it.
        text_width: width of the text tower's hidden state.

    Raises:
        ConfigError: blocks that diffusers does not have.
    """
    try:
        return UNet2DConditionModel(
            sample_size=latent_side,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=config.block_out_channels,
            down_block_types=config.down_block_types,
            up_block_types=config.up_block_types,
            layers_per_block=config.layers_per_block,
            transformer_layers_per_block=config.transformer_layers_per_block,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            cross_attention_dim=text_width,
        )
    except ValueError as error:
        raise ConfigError(
            f"unet: {error}", "give block types of diffusers' UNet2DConditionModel, such as CrossAttnDownBlock2D"
        ) from error


class TextToImage(nn.Module):
    """UNet and text tower as one module, so that one engine trains both."""

    def __init__(self, unet: UNet2DConditionModel, text: TextTower) -> None:
        super().__init__()
        self.unet = unet
        self.text = text

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass rather than keep them."""
        self.unet.enable_gradient_checkpointing()
        self.text.transformer.set_grad_checkpointing(True)

    def use_channels_last(self) -> None:
        """Give every convolution channels-last activations, which diffusers' attention would undo again and again.

        Weights stay as they are: DeepSpeed's broadcast takes no others.
        """
        for layer in self.unet.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(_channels_last)

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Say what the objective has it learn: velocity, noise, data.

        Args:
            noisy: whitened latents with noise [B, C, h, w].
            timestep: [B], the time as the objective embeds it.
            tokens: int64 [B, L].

        Returns:
            [B, C, h, w], in the dtype of the weights.
        """
        output: Tensor = self.unet(noisy.to(self.unet.dtype), timestep, self.text(tokens)).sample
        return output


def _channels_last(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)
