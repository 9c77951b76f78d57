"""The text-conditioned UNet of diffusers, and the one module that the training engine wraps."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from pipeline.config import PER_LEVEL, UNetConfig
from pipeline.errors import ConfigError
from pipeline.models.text import TextTower

DERIVED = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "projection_class_embeddings_input_dim")
"""What diffusers' config has and ours has not, since latents and text towers decide it."""

TIME_IDS = 6
"""Numbers that `text_time` is shown: heights and widths of the original, the crop's place, the target."""


def build(
    config: UNetConfig, latent_channels: int, latent_side: int, text_width: int, pooled_width: int = 0
) -> UNet2DConditionModel:
    """A new UNet with random weights.

    Args:
        config: its geometry.
        latent_channels: C of the latents.
        latent_side: h = w of the latents at the base resolution, a stock pipeline's default picture size.
        text_width: width of what it sees of a token: all text towers' hidden states together.
        pooled_width: width of the pooled text, where `text_time` is asked for.

    Raises:
        ConfigError: blocks that diffusers does not have.
    """
    geometry = config.model_dump(exclude={"pretrained", "addition_embed_type", "addition_time_embed_dim"})
    for name in PER_LEVEL:  # as diffusers' own configs have it
        geometry[name] = geometry[name][0] if len(geometry[name]) == 1 else geometry[name]
    if config.addition_embed_type:
        width = config.addition_time_embed_dim
        geometry |= {
            "addition_embed_type": config.addition_embed_type,
            "addition_time_embed_dim": width,
            "projection_class_embeddings_input_dim": pooled_width + TIME_IDS * width,
        }
    try:
        return UNet2DConditionModel(
            sample_size=latent_side,
            in_channels=latent_channels,
            out_channels=latent_channels,
            cross_attention_dim=text_width,
            **geometry,
        )
    except ValueError as error:
        raise ConfigError(
            f"unet: {error}", "give block types of diffusers' UNet2DConditionModel, such as CrossAttnDownBlock2D"
        ) from error


class TextToImage(nn.Module):
    """The UNet, and the text tower where one is trained with it, as one module, so that one engine trains both.

    Args:
        unet: the UNet.
        text: its own text tower; None where it is shown hidden states.
    """

    def __init__(self, unet: UNet2DConditionModel, text: TextTower | None) -> None:
        super().__init__()
        self.unet = unet
        self.text = text

    @property
    def sees_sizes(self) -> bool:
        """Whether it is shown sizes, crop and pooled text."""
        return bool(self.unet.config.addition_embed_type)

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass rather than keep them."""
        self.unet.enable_gradient_checkpointing()
        if self.text is not None:
            self.text.transformer.set_grad_checkpointing(True)

    def use_channels_last(self) -> None:
        """Give every convolution channels-last activations, which diffusers' attention would undo again and again.

        Weights stay as they are: DeepSpeed's broadcast takes no others.
        """
        for layer in self.unet.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(_channels_last)

    def forward(  # noqa: PLR0917  (an engine's inputs have no names)
        self,
        noisy: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Say what the objective has it learn: velocity, noise, data.

        Args:
            noisy: normalised latents with noise [B, C, h, w].
            timestep: [B], the time as the objective embeds it.
            text: token ids int64 [B, L] for its own tower, else hidden states [B, L, D].
            mask: bool [B, L], True = a token that counts; None = all.
            pooled: [B, P] where `sees_sizes`, else None.
            time_ids: [B, 6], likewise: height and width of the original, top and left of the crop, height and width of
                the target, in pixels (Podell et al. 2023, section 2.2).

        Returns:
            [B, C, h, w], in the dtype of the weights.
        """
        dtype = self.unet.dtype
        states = text if self.text is None else self.text(text)
        added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        output: Tensor = self.unet(
            noisy.to(dtype), timestep, states.to(dtype), encoder_attention_mask=mask, added_cond_kwargs=added
        ).sample
        return output


def _channels_last(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last),)
