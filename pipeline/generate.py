"""Prompts to pictures with the modules given: serves trainer grids, `lathe sample` and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import SamplingConfig
from pipeline.data.images import to_uint8
from pipeline.diffusion.guidance import guided
from pipeline.diffusion.objective import Objective
from pipeline.diffusion.sampler import sample
from pipeline.latents import unwhiten
from pipeline.models.autoencoder import AutoencoderKL, decode, downscale
from pipeline.models.conditioning import Conditioning, PromptEncoder
from pipeline.models.unet import TextToImage
from pipeline.randomness import Purpose, normal


@dataclass(frozen=True)
class Sampled:
    """Of which weights pictures are, and how they were made: what a figure about them is worth little without."""

    weights: str  # an average by its name, or raw
    sampler: str
    steps: int | None  # None: the sampler chose its own
    guidance: float

    @classmethod
    def by(cls, sampling: SamplingConfig, weights: str) -> Sampled:
        """As the run file has it."""
        steps = None if sampling.sampler == "ode" else sampling.steps
        return cls(weights, sampling.sampler, steps, sampling.guidance)

    def __str__(self) -> str:
        steps = f" in {self.steps} steps" if self.steps else ""
        return f"weights {self.weights}, {self.sampler}{steps}, guidance {self.guidance:g}"


@torch.no_grad()
def generate(  # noqa: PLR0917  (the first five go together and are passed on as they are)
    model: TextToImage,
    autoencoder: AutoencoderKL,
    mean: Tensor,
    std: Tensor,
    encode: PromptEncoder,
    prompts: Sequence[str],
    *,
    objective: Objective,
    sampling: SamplingConfig,
    seed: int,
    batch_size: int,
    progress: Callable[[float, int], None] | None = None,
) -> tuple[Tensor, NDArray[np.uint8]]:
    """Make one picture per prompt.

    A picture depends on its prompt, `seed` and the prompt's place in `prompts`, and not on `batch_size`.

    Args:
        model: the trained network; its device is used.
        autoencoder: decodes raw latents; on the same device.
        mean: of the raw latents by channel [C].
        std: of the raw latents by channel [C].
        encode: prompts to what the model is shown of them.
        prompts: one or more.
        objective: what it was trained with; its tables on any device.
        sampling: sampler, steps and guidance.
        seed: of the noise.
        batch_size: pictures made together.
        progress: called with (pictures done, pictures in all) after each step; done may be a fraction.

    Returns:
        Whitened latents float32 [N, C, h, w] and pictures uint8 [N, f*h, f*w, 3], on the CPU.
    """
    device = next(model.parameters()).device
    shape = (model.unet.config.in_channels, model.unet.config.sample_size, model.unet.config.sample_size)
    mean, std = mean.to(device), std.to(device)
    side = shape[1] * downscale(autoencoder)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32) if model.sees_sizes else None
    empty = _shown(encode, [""], sizes, device)
    latents, pictures = [], []
    for first in range(0, len(prompts), batch_size):
        shown = _shown(encode, prompts[first : first + batch_size], sizes, device)
        places = torch.arange(first, first + len(shown.text), device=device)
        denoiser = guided(
            model,
            objective,
            shown,
            empty,
            scale=sampling.guidance,
            rescale=sampling.guidance_rescale,
            interval=sampling.guidance_interval,
        )
        draw = partial(normal, seed, Purpose.INITIAL_NOISE, positions=places, shape=shape)
        report = partial(_report, progress, first, len(places), len(prompts)) if progress else None
        whitened = sample(sampling, objective.path, denoiser, draw, report).float()
        latents.append(whitened.cpu())
        pictures.append(to_uint8(decode(autoencoder, unwhiten(whitened, mean, std))))
    return torch.cat(latents), np.concatenate(pictures)


def _shown(encode: PromptEncoder, prompts: Sequence[str], sizes: Tensor | None, device: torch.device) -> Conditioning:
    """As stock pipelines have it: where sizes are seen, a picture of the base resolution that nothing was cut off."""
    shown = encode(prompts)
    if sizes is None:
        return shown._replace(pooled=None).to(device)
    return shown._replace(time_ids=sizes.expand(len(prompts), -1)).to(device)


def _report(progress: Callable[[float, int], None], before: int, batch: int, prompts: int, share: float) -> None:
    progress(before + share * batch, prompts)
