"""The first-stage autoencoder: diffusers' AutoencoderKL, built, loaded, saved, hashed, and its raw latents."""

from __future__ import annotations

import hashlib

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipeline.config import AutoencoderModelConfig
from pipeline.errors import DataError
from pipeline.models.diffusers_folder import CONFIG, Part
from pipeline.storage import Store, temporary_folder

# AutoencoderKL too: its type, for rooms that may not import diffusers
__all__ = [
    "AutoencoderKL",
    "build",
    "decode",
    "downscale",
    "encode_moments",
    "initialise",
    "load",
    "save",
    "to_float16",
    "use_tiling",
    "weights_hash",
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PART = Part(AutoencoderKL, "vae", "autoencoder")
_LOG_VARIANCE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution has none beyond
_TILE = 512  # side in pixels of the tiles of `tiling`


def build(config: AutoencoderModelConfig) -> AutoencoderKL:
    """A new autoencoder with random weights, for RGB pictures.

    Its `quant_conv` and `post_quant_conv` are there, since export folds the whitening of latents into them, and its
    `scaling_factor` is 1: latents are stored raw and scaled by their measured statistics.
    """
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=_TILE,
        mid_block_add_attention=config.mid_block_attention,
        scaling_factor=1.0,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )


@torch.no_grad()
def initialise(model: AutoencoderKL, colour: Tensor) -> None:
    """Start a new autoencoder near a sensible picture: it saves the first few hundred steps.

    Residual branches begin at zero (Goyal et al. 2017, section 5.1), the posterior nearly without noise, and the
    decoder with the mean colour.

    Args:
        model: from `build`.
        colour: mean of the training pictures by channel, [3] in [-1, 1].
    """
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    model.decoder.conv_out.bias.copy_(colour)
    channels = model.config.latent_channels
    model.quant_conv.weight[channels:] *= 0.1
    model.quant_conv.bias[channels:] = -6.0


def downscale(model: AutoencoderKL) -> int:
    """Pixels of a picture's side per latent: 8 for four levels, of which all but the last halve it."""
    return int(2 ** sum(bool(block.downsamplers) for block in model.encoder.down_blocks))


def use_tiling(model: AutoencoderKL) -> None:
    """Encode pictures larger than the config's `sample_size` in overlapping tiles of that side.

    Raises:
        DataError: tiles of that side would not meet.
    """
    side, step = model.tile_sample_min_size, 4 * downscale(model)  # tiles overlap by a quarter
    if not isinstance(side, int) or side % step:
        raise DataError(
            f"tiling: the autoencoder's sample_size={side} is not a multiple of {step}, so its tiles would not meet",
            f"leave tiling off, or set sample_size in its config.json, for example to {_TILE}",
        )
    model.enable_tiling()


def load(url: str) -> AutoencoderKL:
    """Load an autoencoder in diffusers' format, in float32, ready for inference.

    Args:
        url: a local folder, an `s3://` prefix, or a hub id such as `stabilityai/sd-vae-ft-mse`; of one AutoencoderKL,
            or of a pipeline that has one as `vae`.

    Raises:
        StorageError: the prefix cannot be read.
        DataError: there is no autoencoder at that address, or its files cannot be used.
    """
    model: AutoencoderKL = _PART.load(url)
    if model.config.in_channels != 3:
        raise DataError(
            f"autoencoder {url} takes {model.config.in_channels} channels, and pictures have 3",
            "give an autoencoder of RGB pictures",
        )
    return model.eval().requires_grad_(False)


def save(model: AutoencoderKL, store: Store) -> None:
    """Write weights (safetensors), then `config.json`, as `load` and diffusers read them. Raises StorageError."""
    with temporary_folder("autoencoder") as folder:
        model.save_pretrained(folder, safe_serialization=True)
        for name in (WEIGHTS, CONFIG):
            store.upload(folder / name, name)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights in order of name; on every device the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_moments(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, raw: images [N, 3, H, W] in [-1, 1] to [N, 2C, H/f, W/f]."""
    moments: Tensor = model.encode(images).latent_dist.parameters
    return moments


def decode(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Raw latents [N, C, h, w], neither scaled nor whitened, to images [N, 3, f*h, f*w] around [-1, 1]."""
    images: Tensor = model.decode(latents).sample
    return images


def to_float16(moments: Tensor) -> Tensor:
    """Moments as they are stored: [N, 2C, h, w] to float16, log-variances within the range that diffusers allows.

    What is not finite stays so, and means that float16 cannot hold become infinite.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    held = torch.where(log_variance.isfinite(), log_variance.clamp(*_LOG_VARIANCE), log_variance)
    return torch.cat([mean, held], dim=1).to(torch.float16)
