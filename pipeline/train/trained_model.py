"""A training run's newest checkpoint as a model that makes pictures: for `lathe sample`, `evaluate` and `export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from pipeline import runfile
from pipeline.config import TowerConfig, TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.diffusion.objective import Objective, objective_of
from pipeline.errors import ConfigError, DataError
from pipeline.models import autoencoder
from pipeline.models.autoencoder import AutoencoderKL
from pipeline.models.conditioning import FrozenTowers, TokenIds
from pipeline.models.text import Tokenizer
from pipeline.models.unet import TextToImage
from pipeline.storage import Store, open_store, split
from pipeline.train import checkpoint
from pipeline.train.network import build_network
from pipeline.train.towers import towers_of_run
from pipeline.train.trained_on import trained_on


@dataclass(frozen=True)
class TrainedModel:
    """The network with its weights loaded, in eval mode and float32 on the CPU, and what it was trained on.

    Args:
        step: optimizer steps behind it.
        weights: which these are: an average by its name, or `raw`.
        config: the resolved run file of the training.
        manifests: of its latents, one for each of `config.sources`.
        mean: of the raw latents by channel, float32 [C]; with `std` it undoes the whitening.
        std: standard deviation of the raw latents by channel, float32 [C].
        model: the network, text tower included.
        prompts: what the network is shown of prompts, by the tokenizers and frozen towers of its captions.
    """

    step: int
    weights: str
    config: TrainConfig
    manifests: tuple[Manifest, ...]
    mean: Tensor
    std: Tensor
    model: TextToImage
    prompts: TokenIds | FrozenTowers

    @property
    def manifest(self) -> Manifest:
        """The first data set's: in autoencoder, shape of latents and text, the others agree with it."""
        return self.manifests[0]

    @property
    def objective(self) -> Objective:
        """What the network's output means."""
        return objective_of(self.config.objective)

    def load_autoencoder(self, url: str) -> AutoencoderKL:
        """The autoencoder at `url`. Raises DataError when it is not the one that made the training latents."""
        return load_autoencoder(url, self.manifest)


def load_autoencoder(url: str, manifest: Manifest) -> AutoencoderKL:
    """The autoencoder at `url`. Raises DataError when it is not the one that made the manifest's latents."""
    loaded = autoencoder.load(url)
    if autoencoder.weights_hash(loaded) != manifest.fingerprint.autoencoder_weights:
        raise DataError(
            f"{url} is not the autoencoder that the training latents came from",
            f"use the one that encoded them: {manifest.autoencoder}",
        )
    return loaded


def load_trained(run: str, which: str = "", towers: Sequence[TowerConfig] = ()) -> TrainedModel:
    """Load a run's newest complete checkpoint, or the one that `run` names (`.../step-00001000`).

    Args:
        run: the training's output, or what `lathe ema` made of it.
        which: an average by its name, or `raw`; empty = the first average.
        towers: where its frozen text towers are, if its run file does not say, or they have moved.

    Raises:
        DataError: no complete checkpoint, or one that cannot be used.
        ConfigError: its run file says what this Lathe refuses; the towers are missing, or not the run's.
        StorageError: it cannot be read.
    """
    store, name = find_run(run)
    saved = checkpoint.open_checkpoint(store, name)
    which = which or checkpoint.default_weights(saved.run())
    config = _config(saved)
    weights = checkpoint.load_weights(store, name, which)
    latents = trained_on(saved)
    prompts = prompt_encoder(config, latents.manifests[0], towers)
    model = build_network(config, latents.manifests[0], prompts if isinstance(prompts, FrozenTowers) else None)
    model.load_state_dict(weights)
    return TrainedModel(
        step=saved.step,
        weights=which,
        config=config,
        manifests=latents.manifests,
        mean=torch.tensor(latents.mean),
        std=torch.tensor(latents.std),
        model=model.eval(),
        prompts=prompts,
    )


def prompt_encoder(
    config: TrainConfig, manifest: Manifest, towers: Sequence[TowerConfig] = ()
) -> TokenIds | FrozenTowers:
    """What a run's network is shown of prompts; `towers` and errors as for `load_trained`."""
    if config.text.mode != "joint":
        return towers_of_run(config, manifest, towers)
    if towers:
        raise ConfigError("towers: the run has a text tower of its own, in its checkpoints", "leave towers out")
    return TokenIds(Tokenizer(config.text.context_length))


def _config(saved: checkpoint.Checkpoint) -> TrainConfig:
    """Raises ConfigError where it was saved by a Lathe that took what this one refuses."""
    try:
        return TrainConfig.model_validate(yaml.safe_load(saved.read(checkpoint.CONFIG)))
    except ValidationError as error:
        raise runfile.explain(TrainConfig, f"{saved.store.url}/{saved.name}/{checkpoint.CONFIG}", error) from error


def names_checkpoint(run: str) -> bool:
    """Whether an address is that of one checkpoint, complete or not, and not of a run."""
    return checkpoint.is_name(run.rstrip("/").rpartition("/")[2])


def find_run(run: str) -> tuple[Store, str]:
    """Folder and name of a run's newest complete checkpoint, or of the one that `run` names. Raises DataError."""
    if names_checkpoint(run):
        parent, name = split(run)
        return open_store(parent), name
    store = open_store(run)
    newest = checkpoint.latest(store)
    if newest is None:
        raise DataError(f"{run} holds no complete checkpoint", "train first, or give the output of a training run")
    return store, newest
