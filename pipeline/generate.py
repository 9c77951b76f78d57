"""Prompts to pictures with the modules given: serves trainer grids, `lathe sample` and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.images import to_uint8
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.sampler import euler, guided
from pipeline.latents import unwhiten
from pipeline.models.autoencoder import AutoencoderKL, decode
from pipeline.models.text import Tokenizer
from pipeline.models.unet import TextToImage
from pipeline.randomness import Purpose, normal


@torch.no_grad()
def generate(  # noqa: PLR0917  (the first five go together and are passed on as they are)
    model: TextToImage,
    autoencoder: AutoencoderKL,
    mean: Tensor,
    std: Tensor,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    objective: Objective,
    guidance: float,
    steps: int,
    seed: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Make one picture per prompt.

    The noise of a picture depends on `seed` and the prompt's place in `prompts` alone, not on `batch_size`.

    Args:
        model: the trained network; its device is used.
        autoencoder: decodes raw latents; on the same device.
        mean: of the raw latents by channel [C].
        std: of the raw latents by channel [C].
        tokenizer: the one the model was trained with.
        prompts: one or more.
        objective: what it was trained with; its tables on any device.
        guidance: classifier-free guidance scale; 1 = off.
        steps: Euler steps.
        seed: of the initial noise.
        batch_size: pictures made together.
        progress: called with (pictures done, pictures in all) after each batch.

    Returns:
        Whitened latents float32 [N, C, h, w] and pictures uint8 [N, f*h, f*w, 3], on the CPU.
    """
    device = next(model.parameters()).device
    shape = (model.unet.config.in_channels, model.unet.config.sample_size, model.unet.config.sample_size)
    mean, std = mean.to(device), std.to(device)
    empty = torch.from_numpy(tokenizer.empty.astype(np.int64)).to(device)
    latents, pictures = [], []
    for first in range(0, len(prompts), batch_size):
        tokens = torch.from_numpy(tokenizer(prompts[first : first + batch_size]).astype(np.int64)).to(device)
        places = torch.arange(first, first + len(tokens), device=device)
        noise = normal(seed, Purpose.INITIAL_NOISE, 0, places, shape)
        denoise = objective.denoiser(guided(model, tokens, empty, guidance))
        whitened = euler(denoise, objective.path, noise, steps).float()
        latents.append(whitened.cpu())
        pictures.append(to_uint8(decode(autoencoder, unwhiten(whitened, mean, std))))
        if progress:
            progress(first + len(tokens), len(prompts))
    return torch.cat(latents), np.concatenate(pictures)
