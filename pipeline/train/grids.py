"""Pictures of fixed prompts in the midst of training, made by all ranks together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import Scale
from pipeline.diffusion.grid import levels
from pipeline.diffusion.objective import objective_of
from pipeline.generate import generate
from pipeline.models.conditioning import FrozenTowers, Remembered
from pipeline.models.unet import TextToImage
from pipeline.runtime.process import Process
from pipeline.train.trained_model import load_autoencoder, prompt_encoder


class Grids:
    """Prompts are shared by the ranks, each of which makes as many pictures, as ZeRO-3 needs it.

    Args:
        config: the run file.
        ranks: this rank among the others.
        manifest: of the latents.
        scale: how they are whitened.
        batch_size: pictures made together.
        towers: that run while training; None = none do.

    Raises:
        ConfigError: the run file does not say where the text towers are that prompts need, or asks for a grid of times
            that its objective cannot have.
        DataError: the autoencoder is not the one that made the latents.
        StorageError: it cannot be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Process,
        manifest: Manifest,
        scale: Scale,
        *,
        batch_size: int,
        towers: FrozenTowers | None = None,
    ) -> None:
        self._settings, self._ranks, self._batch_size = config.validation, ranks, batch_size
        self._objective = objective_of(config.objective, ranks.device)
        sampling = config.validation.sampling
        levels(self._objective.path, sampling.grid, sampling.steps)  # what cannot be is told now
        self._autoencoder = load_autoencoder(config.validation.autoencoder, manifest)
        self._autoencoder.enable_slicing()  # one by one: a batch of large pictures has no room beside the training
        self._mean, self._std = torch.tensor(list(scale.mean)), torch.tensor(list(scale.std))
        encode = towers or prompt_encoder(config, manifest)
        self._encode = Remembered(encode, [*config.validation.prompts, ""])
        prompts = len(config.validation.prompts)
        share = -(-prompts // ranks.world_size)
        self._places = [min(ranks.rank * share + place, prompts - 1) for place in range(share)]

    def make(self, network: TextToImage, before_each: Callable[[], None]) -> NDArray[np.uint8]:
        """A picture of each prompt, uint8 [N, H, W, 3]; the same at any world size, on all ranks.

        Args:
            network: with the weights that are wanted.
            before_each: called at each of the sampler's steps, as often on every rank.
        """
        prompts = self._settings.prompts
        try:
            _, pictures = generate(
                network,
                self._autoencoder.to(self._ranks.device),
                self._mean,
                self._std,
                self._encode,
                [prompts[place] for place in self._places],
                objective=self._objective,
                sampling=self._settings.sampling,
                seed=self._settings.seed,
                batch_size=self._batch_size,
                places=self._places,
                progress=lambda _done, _all: before_each(),
            )
        finally:
            self._autoencoder.to("cpu")  # its memory is the training's
        everyones = self._ranks.gather(torch.from_numpy(pictures))
        whole: NDArray[np.uint8] = torch.cat(everyones).numpy()[: len(prompts)]
        return whole
