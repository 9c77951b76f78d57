"""The autoencoder and the tokenizer of one encode job, and the fingerprint of what they make."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch

from pipeline import __version__
from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.manifest import Environment, Fingerprint, canonical
from pipeline.errors import ConfigError
from pipeline.models import autoencoder
from pipeline.models.text import Tokenizer


class Encoder:
    """Pixels to posterior moments, captions to token ids.

    Raises:
        ConfigError: the resolution is no multiple of the autoencoder's downsampling factor.
        DataError, StorageError: the autoencoder cannot be loaded.
    """

    def __init__(self, config: EncodeConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = autoencoder.load(config.autoencoder).to(self._device)
        self.tokenizer = Tokenizer(config.text.context_length)
        self.channels = int(self._model.config.latent_channels)
        self.downsampling_factor = autoencoder.downscale(self._model)
        side, factor = config.images.resolution, self.downsampling_factor
        if side % factor:
            raise ConfigError(
                f"images.resolution: {side} is not a multiple of {factor}, the autoencoder's downsampling factor",
                f"use {side - side % factor or factor}",
            )
        self.fingerprint = self._fingerprint(config)
        self.environment = self._environment(config)

    @torch.inference_mode()
    def moments(self, pixels: images.Pixels) -> npt.NDArray[np.float16]:
        """Mean and log-variance of the posterior, raw: uint8 [N, H, W, 3] -> float16 [N, 2C, H/f, W/f].

        Computed in float32; what float16 cannot hold becomes infinite.
        """
        moments = autoencoder.encode_moments(self._model, images.normalise(pixels).to(self._device))
        return moments.to(torch.float16).cpu().numpy()

    def _fingerprint(self, config: EncodeConfig) -> Fingerprint:
        text = self.tokenizer.fingerprint()
        return Fingerprint(
            autoencoder_weights=autoencoder.weights_hash(self._model),
            # Names with "_" tell where and by which version it was saved, not what it computes.
            autoencoder_config=_digest({k: v for k, v in dict(self._model.config).items() if not k.startswith("_")}),
            normalisation=images.NORMALISATION,
            resize_filter=images.RESIZE_FILTER,
            crop_rule=images.CROP_RULE,
            resolution=config.images.resolution,
            background=config.images.background,
            text_mode=config.text.mode,
            tokenizer=_digest(text),
            context_length=config.text.context_length,
            text_padding=str(text["padding"]),
            caption_field=config.images.caption_field,
            dtype="float16",
            holdout=config.images.holdout,
        )

    def _environment(self, config: EncodeConfig) -> Environment:
        """What the last places of float16 latents were seen to depend on."""
        cuda = self._device.type == "cuda"
        return {
            "lathe": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "pillow": version("pillow"),
            "device": torch.cuda.get_device_name(self._device) if cuda else f"cpu {platform.machine()}",
            "threads": torch.get_num_threads(),
            "batch_size": config.batch_size,
        }


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
