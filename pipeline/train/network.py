"""The network of a run, new or to be filled with a checkpoint's weights."""

from __future__ import annotations

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.models import unet
from pipeline.models.text import TextTower
from pipeline.models.unet import TextToImage


def build_network(config: TrainConfig, manifest: Manifest) -> TextToImage:
    """UNet and text tower with random weights, in the geometry that run file and latents ask for.

    Args:
        config: the run file.
        manifest: of the latents; any of a run's, since they agree in what matters here.

    Raises:
        ConfigError: a UNet that diffusers does not have.
    """
    network = unet.build(config.unet, manifest.latent_channels, manifest.latent_side, config.text.width)
    return TextToImage(network, TextTower(config.text))
