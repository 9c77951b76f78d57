"""A training run's newest checkpoint as a model that makes pictures: for `lathe sample`, `evaluate` and `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import yaml
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest, parse_manifest
from pipeline.errors import DataError
from pipeline.models import autoencoder, unet
from pipeline.models.autoencoder import AutoencoderKL
from pipeline.models.text import TextTower, Tokenizer
from pipeline.models.unet import TextToImage
from pipeline.storage import Store, open_store, split
from pipeline.train import checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """The network with its weights loaded, in eval mode and float32 on the CPU, and what it was trained on.

    Args:
        step: optimizer steps behind it.
        config: the resolved run file of the training.
        manifest: of its latents; the statistics undo the whitening.
        model: velocity network, text tower included.
        tokenizer: the one the captions were tokenized with.
    """

    step: int
    config: TrainConfig
    manifest: Manifest
    model: TextToImage
    tokenizer: Tokenizer

    @property
    def mean(self) -> Tensor:
        """Mean of the raw latents by channel, float32 [C]."""
        return torch.tensor(self.manifest.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the raw latents by channel, float32 [C]."""
        return torch.tensor(self.manifest.std)

    def load_autoencoder(self, url: str) -> AutoencoderKL:
        """The autoencoder at `url`. Raises DataError when it is not the one that made the training latents."""
        loaded = autoencoder.load(url)
        if autoencoder.weights_hash(loaded) != self.manifest.fingerprint.autoencoder_weights:
            raise DataError(
                f"{url} is not the autoencoder that the training latents came from",
                f"use the one that encoded them: {self.manifest.autoencoder}",
            )
        return loaded


def load_trained(run: str, which: Literal["ema", "raw"] = "ema") -> TrainedModel:
    """Load a run's newest complete checkpoint, or the one that `run` names (`.../step-00001000`).

    Raises:
        DataError: no complete checkpoint, or one that cannot be used.
        StorageError: it cannot be read.
    """
    store, name = _find(run)
    saved = checkpoint.open_checkpoint(store, name)
    config = TrainConfig.model_validate(yaml.safe_load(saved.read(checkpoint.CONFIG)))
    manifest = parse_manifest(saved.read(checkpoint.MANIFEST), f"{store.url}/{name}/{checkpoint.MANIFEST}")
    network = unet.build(config.unet, manifest.latent_channels, manifest.latent_side, config.text.width)
    model = TextToImage(network, TextTower(config.text))
    model.load_state_dict(checkpoint.load_weights(store, name, which))
    return TrainedModel(saved.step, config, manifest, model.eval(), Tokenizer(config.text.context_length))


def _find(run: str) -> tuple[Store, str]:
    if checkpoint.is_name(run.rstrip("/").rpartition("/")[2]):
        parent, name = split(run)
        return open_store(parent), name
    store = open_store(run)
    newest = checkpoint.latest(store)
    if newest is None:
        raise DataError(f"{run} holds no complete checkpoint", "train first, or give the output of a training run")
    return store, newest
