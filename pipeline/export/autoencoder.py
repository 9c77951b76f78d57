"""The scale of the latents as a part of the autoencoder, as stock pipelines want it."""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pipeline.errors import DataError


def fold_whitening(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor) -> AutoencoderKL:
    """A copy that encodes to normalised latents, (z - mean) / std, and decodes from them.

    Where nothing is shifted and all channels are scaled alike, that is its `scaling_factor`. Else `scaling_factor` is
    1: both maps are affine by channel, as are `quant_conv` and `post_quant_conv`, and the composition is exact.

    Args:
        autoencoder: with raw latents.
        mean: [C].
        std: [C].

    Raises:
        DataError: the autoencoder was built without `quant_conv` or `post_quant_conv`.
    """
    unscaled = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    if not mean.any() and bool((std == std[0]).all()):
        scaled = copy.deepcopy(autoencoder).float().cpu().eval()
        scaled.register_to_config(scaling_factor=1.0 / float(std[0]), **unscaled)
        return scaled
    if autoencoder.quant_conv is None or autoencoder.post_quant_conv is None:
        raise DataError(
            "the autoencoder has no quant_conv and post_quant_conv, so a stock pipeline cannot undo the whitening",
            "use an autoencoder with use_quant_conv and use_post_quant_conv (`lathe train-vae` makes such)",
        )
    folded = copy.deepcopy(autoencoder).float().cpu().eval()
    folded.register_to_config(scaling_factor=1.0, **unscaled)
    shift, scale = mean.double().cpu(), std.double().cpu()
    encoder, decoder = folded.quant_conv, folded.post_quant_conv
    # mean' = (mean - shift) / scale and logvar' = logvar - 2 log(scale); z = scale z' + shift
    factor = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([-shift / scale, -2 * scale.log()])
    with torch.no_grad():
        weight, bias = decoder.weight.double(), decoder.bias.double()
        decoder.bias.copy_(bias + weight.flatten(1) @ shift)
        decoder.weight.copy_(weight * scale.view(1, -1, 1, 1))
        encoder.bias.copy_(encoder.bias.double() * factor + offset)
        encoder.weight.copy_(encoder.weight.double() * factor.view(-1, 1, 1, 1))
    return folded
