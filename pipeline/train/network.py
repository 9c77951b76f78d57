"""The network of a run, new or to be filled with a checkpoint's weights."""

from __future__ import annotations

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError, LatheError
from pipeline.models import pretrained_unet, unet
from pipeline.models.conditioning import FrozenTowers
from pipeline.models.text import TextTower
from pipeline.models.unet import TextToImage
from pipeline.runtime.process import Process
from pipeline.storage import Store
from pipeline.train import checkpoint


def build_network(config: TrainConfig, manifest: Manifest, towers: FrozenTowers | None = None) -> TextToImage:
    """The UNet, and with text.mode=joint the text tower, with random weights, as run file and latents ask for them.

    Args:
        config: the run file.
        manifest: of the latents; any of a run's, since they agree in what matters here.
        towers: the frozen ones, whose widths nobody else knows with text.mode=online.

    Raises:
        ConfigError: a UNet that diffusers does not have, or one that wants a pooled text where there is none.
    """
    width, pooled = _text_widths(config, manifest, towers)
    if config.unet.addition_embed_type and not pooled:
        raise ConfigError(
            f"unet.addition_embed_type: {config.unet.addition_embed_type} shows the UNet pooled text, and no text tower"
            " has one",
            "set it to null, or encode captions with a tower of pooled=true",
        )
    network = unet.build(config.unet, manifest.latent_channels, manifest.base_side, width, pooled)
    return TextToImage(network, TextTower(config.text) if config.text.mode == "joint" else None)


def _text_widths(config: TrainConfig, manifest: Manifest, towers: FrozenTowers | None) -> tuple[int, int]:
    """Of what the UNet sees of a token, and of the pooled text; 0 = there is none."""
    if config.text.mode == "joint":
        return config.text.width, 0
    if towers is not None:
        return towers.width, towers.pooled_width
    stored = manifest.fingerprint.text_towers
    return sum(tower.width for tower in stored), sum(tower.pooled_width for tower in stored)


def start_from_pretrained(network: TextToImage, url: str, ranks: Process, store: Store) -> None:
    """Fill the UNet with pretrained weights, unless there are checkpoints, which have the run's own.

    Rank 0 alone reads them: the engine makes all ranks' weights equal to its. All ranks call it, before the engine.

    Args:
        network: new, in the pretrained one's geometry.
        url: of the pretrained UNet.
        ranks: this rank among the others.
        store: the run's output.

    Raises:
        ConfigError: it does not fit latents and captions.
        DataError, StorageError: it cannot be read; OtherRankError on the other ranks.
    """
    problem: LatheError | None = None
    try:
        pretrained_unet.check(url, network.unet)
        if ranks.is_main and not checkpoint.find(store, warn=False):
            pretrained_unet.load_into(network.unet, url)
    except LatheError as error:
        problem = error
    ranks.agree(problem)
