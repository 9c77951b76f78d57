"""The usual way, as diffusers' own training script has it: autoencoder and text encoder in the loop, EMA outside.

Pictures and captions lie in memory, decoded and tokenized, which its users do not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.runtime.base import DTYPES
from pipeline.runtime.process import Process
from pipeline.train.network import build_network
from pipeline.train.telling import engine_configuration

_FACTOR = 8  # of the autoencoder, in pixels a latent


@dataclass(frozen=True)
class Encoders:
    """Geometry of what encodes in the loop.

    Args:
        autoencoder_widths: of the autoencoder's stages.
        text_width: of the text encoder.
        text_layers: of it.
        text_heads: of it.
    """

    autoencoder_widths: Sequence[int]
    text_width: int
    text_layers: int
    text_heads: int


class UsualLoop:
    """A step of the usual way for the same number of pictures.

    Args:
        config: the trainer's run file.
        ranks: this rank among the others.
        encoders: what runs beside the UNet, in its precision, with random weights.
        batch: pictures of this rank in a step.
        manifest: of the latents, for the UNet's geometry.
    """

    def __init__(
        self, config: TrainConfig, ranks: Process, encoders: Encoders, *, batch: int, manifest: Manifest
    ) -> None:
        network = build_network(config, manifest)
        unet: UNet2DConditionModel = network.unet
        side, device, dtype = manifest.latent_side, ranks.device, DTYPES[config.engine.precision]
        self._autoencoder = _autoencoder(encoders, manifest.latent_channels).to(device, dtype).requires_grad_(False)
        self._text = _text_encoder(encoders).to(device, dtype).requires_grad_(False)
        self._scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self._pixels = torch.rand(batch, 3, _FACTOR * side, _FACTOR * side, device=device, dtype=dtype) * 2 - 1
        self._tokens = torch.randint(0, self._text.config.vocab_size, (batch, 77), device=device)
        chosen = config.optimizer
        self._engine, *_ = deepspeed.initialize(
            model=unet.to(device),
            optimizer=torch.optim.AdamW(unet.parameters(), lr=chosen.learning_rate, fused=True),
            config=engine_configuration(config, ranks.world_size),
            dist_init_required=False,
        )
        self._ema = EMAModel(unet.parameters(), decay=0.999)

    def __call__(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        with torch.no_grad():
            posterior = self._autoencoder.encode(self._pixels).latent_dist
            latents = posterior.sample() * self._autoencoder.config.scaling_factor
            hidden = self._text(self._tokens)[0]
        noise = torch.randn_like(latents)
        steps = torch.randint(0, self._scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self._scheduler.add_noise(latents, noise, steps)
        prediction = self._engine(noisy, steps, hidden).sample
        self._engine.backward(functional.mse_loss(prediction.float(), noise.float()))
        self._engine.step()
        self._ema.step(self._engine.module.parameters())


def _autoencoder(encoders: Encoders, latent_channels: int) -> AutoencoderKL:
    widths = tuple(encoders.autoencoder_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=latent_channels,
    )


def _text_encoder(encoders: Encoders) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=encoders.text_width,
            intermediate_size=4 * encoders.text_width,
            num_hidden_layers=encoders.text_layers,
            num_attention_heads=encoders.text_heads,
            projection_dim=encoders.text_width,
        )
    )
