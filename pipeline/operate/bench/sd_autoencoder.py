"""The architecture of Stable Diffusion's autoencoder, random weights: the bare model, the job, the usual loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.encode.encoder import Encoder
from pipeline.encode.job import EncodesAndDescribes
from pipeline.encode.sources import find_sources
from pipeline.encode.worker import PendingMoments
from pipeline.operate.bench.pictures import write_shards
from pipeline.operate.bench.runs import job_config, named, timed, timed_job, timed_naive, told
from pipeline.storage import open_store, open_stream


@dataclass(frozen=True)
class AutoencoderSizes:
    """How much is encoded with the real model."""

    shards: int = 2
    per_shard: int = 8
    batch_size: int = 4
    picture_side: int = 512  # pixels
    resolution: int = 256
    widths: tuple[int, ...] = (128, 256, 512, 512)  # of the autoencoder's stages: Stable Diffusion's


def measure_autoencoder(
    sizes: AutoencoderSizes, root: str, folder: Path, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The bare model on pictures in memory, the job, the usual loop: in turn, on the same pictures.

    Args:
        sizes: how much.
        root: address of an empty place for shards and latents.
        folder: a local one, for the autoencoder.
        repeats: rounds.
        say: told what is going on.

    Raises:
        StorageError: the place cannot be written.
    """
    pictures = sizes.shards * sizes.per_shard
    _write_autoencoder(folder, sizes.widths)
    write_shards(open_store(f"{root}/images"), sizes.shards, sizes.per_shard, sizes.picture_side)
    config = job_config(root, sizes.resolution, sizes.batch_size, autoencoder=str(folder))
    encoder = Encoder(config)
    batches = _batches(config)
    encoder.start(batches[0], False).result()  # first calls set things up
    rounds = []
    for number in range(repeats):
        say(f"Stable Diffusion's autoencoder, {pictures} pictures: round {number + 1} of {repeats}")
        bare = timed(lambda: _bare(encoder, batches))
        job = timed_job(config, encoder, sizes.shards)
        loop = timed_naive(config, encoder, sizes.shards)
        rounds.append(
            {
                **named(model=bare, job=job, naive=loop),
                "job_over_model": bare["seconds"] / job["seconds"],
                "naive_over_model": bare["seconds"] / loop["seconds"],
            }
        )
    return {"pictures": pictures, "device": encoder.environment.get("device", ""), **told(rounds)}


def _write_autoencoder(folder: Path, widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)


def _batches(config: EncodeConfig) -> list[images.Pixels]:
    """The job's pictures as it hands them to its encoder: batches within one shard."""
    side = int(config.images.resolutions[0])
    batches = []
    for source in find_sources(config):
        with open_stream(source.url) as stream:
            samples = [one for one in read_image_shard(stream) if isinstance(one, ImageSample)]
        pixels = [images.cover(images.decode(one.image_bytes), (side, side)) for one in samples]
        starts = range(0, len(pixels), config.batch_size)
        batches += [np.stack(pixels[first : first + config.batch_size]) for first in starts]
    return batches


def _bare(encoder: EncodesAndDescribes, batches: Sequence[images.Pixels]) -> int:
    """The model's own work, the next batch in line while one is encoded; returns the number of pictures."""
    before: PendingMoments | None = None
    for pixels in batches:
        pending = encoder.start(pixels, False)
        if before is not None:
            before.result()
        before = pending
    if before is not None:
        before.result()
    return sum(map(len, batches))
