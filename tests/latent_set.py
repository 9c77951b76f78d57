"""A small latent data set with its pictures and autoencoder, made without the encode job, sound or damaged at will."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from support import fingerprint

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.fold import Provenance, fold
from pipeline.data.manifest import ENCODING, MANIFEST, RECEIPT_SUFFIX, REJECTS, Manifest, Receipt, Tower, canonical
from pipeline.data.samples import is_holdout
from pipeline.data.tar import TarBuilder, npy_bytes
from pipeline.encode.claim import Encoding
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity
from pipeline.encode.rejects import reject_lines
from pipeline.models import autoencoder
from pipeline.models.text import Tokenizer

BUCKETS = ((24, 40), (32, 32), (40, 24))
CHANNELS, FACTOR, CONTEXT, BLOCK_SAMPLES, HOLDOUT = 4, 4, 8, 3, 0.3
SHARDS, PER_SHARD = 3, 14
TOKENIZER = Tokenizer(CONTEXT)
Prepare = Callable[[images.Pixels], torch.Tensor]
Alter = Callable[[int, list[tuple[EncodedSample, bool]]], Sequence[tuple[EncodedSample, bool]]]


def key(shard: int, i: int) -> str:
    return f"{shard:02d}{i:03d}"


def picture(shard: int, i: int) -> images.Pixels:
    """Smooth enough for an autoencoder, of the shape of one bucket, a little larger."""
    height, width = BUCKETS[(shard + i) % len(BUCKETS)]
    rng = np.random.default_rng(100 * shard + i)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return small.repeat(8, 0).repeat(8, 1)


def save_autoencoder(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=CHANNELS,
    )
    model.save_pretrained(folder)
    return str(folder)


def write_pictures(folder: Path) -> None:
    """Image shards 00000.tar, ..., one picture of each without a caption."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        tar = TarBuilder()
        for i in range(PER_SHARD):
            tar.add(f"{key(shard, i)}.png", images.png(picture(shard, i)))
            tar.add(f"{key(shard, i)}.json", json.dumps({"caption": captions(i)}).encode())
        tar.add(f"bad{shard}.png", images.png(picture(shard, 0)))
        (folder / f"{shard:05d}.tar").write_bytes(tar.finish())


def captions(i: int) -> list[str]:
    return [f"picture {i}", "another word for it"][: 1 + i % 2]


def unchanged(shard: int, samples: list[tuple[EncodedSample, bool]]) -> list[tuple[EncodedSample, bool]]:
    return samples


def build(place: Path, *, prepare: Prepare = images.normalise, encoder: str = "vae", alter: Alter = unchanged) -> str:
    """Latents of `place/images` in `place/latents`; returns the manifest's address.

    Args:
        place: has `images` and the autoencoder `vae`, of which the manifest tells.
        prepare: pixels [N, H, W, 3] to the autoencoder's input.
        encoder: the autoencoder in `place` that is used in truth.
        alter: is given each shard's number and samples (with whether they are held out), and returns what to store.
    """
    told = autoencoder.load(str(place / "vae"))
    model = autoencoder.load(str(place / encoder))
    tokenizer = hashlib.sha256(canonical(TOKENIZER.fingerprint())).hexdigest()
    mark = fingerprint(
        resolution=32,
        autoencoder_weights=autoencoder.weights_hash(told),
        buckets=BUCKETS,
        flip=True,
        holdout=HOLDOUT,
        text_towers=(Tower(name="clip", tokenizer=tokenizer, context_length=CONTEXT),),
    )
    about = Provenance(
        fingerprint=mark,
        images=(str(place / "images"),),
        shard_name_parts=1,
        autoencoder=str(place / "vae"),
        latent_channels=CHANNELS,
        downsampling_factor=FACTOR,
        scaling_factor=0.2,
    )
    folder = place / "latents"
    folder.mkdir(parents=True)
    receipts = []
    for shard in range(SHARDS):
        name = f"{shard:05d}.tar"
        source = (place / "images" / name).read_bytes()
        latents = LatentShard(name, CHANNELS, BLOCK_SAMPLES)
        samples = [(one, is_holdout(one.key, HOLDOUT)) for one in encoded(model, prepare, shard)]
        for sample, held_out in alter(shard, samples):
            latents.add(sample, holdout=held_out)
        latents.reject(f"bad{shard}", "no_caption")
        identity = SourceIdentity(name, len(source), hashlib.sha256(source).hexdigest())
        data, receipt = latents.finish(name, identity, mark.digest(), {"threads": 1})
        (folder / name).write_bytes(data)
        receipts.append(receipt)
    kept = {
        one.name: getattr(about, one.name) for one in dataclasses.fields(about) if one.name in Encoding.model_fields
    }
    (folder / ENCODING).write_bytes(Encoding(**kept).to_bytes())
    (folder / "empty.tokens.clip.npy").write_bytes(npy_bytes(TOKENIZER.empty))
    commit(folder, receipts, about)
    return f"{folder}/{MANIFEST}"


def commit(folder: Path, receipts: list[Receipt], about: Provenance) -> Manifest:
    """Write receipts, rejects and manifest."""
    for receipt in receipts:
        (folder / (receipt.shard + RECEIPT_SUFFIX)).write_bytes(receipt.to_bytes())
    (folder / REJECTS).write_text("".join(line for receipt in receipts for line in reject_lines(receipt)))
    manifest = fold(receipts, about)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def encode_settings(place: Path, output: Path, text: dict[str, Any] | None = None) -> EncodeConfig:
    """For the encode job itself, on the same pictures and autoencoder: two resolutions, buckets, mirrored too."""
    tree = {
        "images": {
            "shards": str(place / "images"),
            "resolution": [32, 48],
            "buckets": {"max_aspect": 2, "step": 8},
            "flip": True,
            "holdout": HOLDOUT,
            "filters": {"max_caption_chars": 18},
        },
        "autoencoder": str(place / "vae"),
        "output": str(output),
        "max_reject_rate": 0.5,
        "batch_size": 4,
        "block_samples": 3,
        "threads": 1,
        "metrics": {"prometheus": False},
        "text": text or {"context_length": CONTEXT},
    }
    return EncodeConfig.model_validate(tree)


@torch.inference_mode()
def encoded(model: Any, prepare: Prepare, shard: int) -> Iterator[EncodedSample]:
    for i in range(PER_SHARD):
        whole, bucket = picture(shard, i), BUCKETS[(shard + i) % len(BUCKETS)]
        pixels = images.cover(whole, bucket)
        both = np.stack([pixels, pixels[:, ::-1]])
        moments = autoencoder.to_float16(autoencoder.encode_moments(model, prepare(both))).numpy()
        yield EncodedSample(
            key=key(shard, i),
            captions=tuple(captions(i)),
            bucket=bucket,
            moments=moments[0],
            flipped=moments[1],
            text=tuple({"tokens.clip": row} for row in TOKENIZER(captions(i))),
            size=images.size_record(whole.shape[0], whole.shape[1], bucket),
        )
