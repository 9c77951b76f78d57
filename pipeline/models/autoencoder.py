"""The first-stage autoencoder: diffusers' AutoencoderKL, built, loaded, saved, hashed, and its raw latents."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from pipeline.config import AutoencoderModelConfig
from pipeline.errors import DataError
from pipeline.storage import Store, fetch_folder

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
    "weights_hash",
]

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"


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
    """Pixels of a picture's side per latent: 8 for four levels."""
    return int(2 ** (len(model.config.block_out_channels) - 1))


def load(url: str) -> AutoencoderKL:
    """Load an autoencoder in diffusers' format, in float32, ready for inference.

    Args:
        url: a local folder, an `s3://` prefix, or a hub id such as `stabilityai/sd-vae-ft-mse`.

    Raises:
        StorageError: the prefix cannot be read.
        DataError: there is no autoencoder at that address, or its files cannot be used.
    """
    if "://" in url:
        with tempfile.TemporaryDirectory(prefix="lathe-autoencoder-") as folder:
            return _read(str(fetch_folder(url, Path(folder))), url)
    if not Path(url).is_dir() and (url.startswith((".", "/", "~")) or url.count("/") != 1):
        raise DataError(f"autoencoder {url}: no such folder", "give a folder, an s3:// prefix or a hub id (owner/name)")
    return _read(url, url)


def save(model: AutoencoderKL, store: Store) -> None:
    """Write weights (safetensors), then `config.json`, as `load` and diffusers read them. Raises StorageError."""
    with tempfile.TemporaryDirectory(prefix="lathe-autoencoder-") as folder:
        model.save_pretrained(folder, safe_serialization=True)
        for name in (WEIGHTS, CONFIG):
            store.upload(Path(folder) / name, name)


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


def _read(place: str, url: str) -> AutoencoderKL:
    if Path(place).is_dir() and not (Path(place) / CONFIG).is_file():
        raise DataError(
            f"autoencoder {url}: the folder has no {CONFIG}",
            "give the folder of one AutoencoderKL in diffusers' format (in a pipeline's folder that is `vae`)",
        )
    try:
        model = AutoencoderKL.from_pretrained(place, torch_dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # diffusers and the hub client raise a dozen unrelated kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            "check that it is a whole AutoencoderKL in diffusers' format, with safetensors weights"
            if Path(place).is_dir()
            else "no such folder here; a hub id needs a network: check it, or download the model and give its folder"
        )
        raise DataError(f"autoencoder {url} cannot be loaded: {said}", remedy) from error
    return model.eval()
