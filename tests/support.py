"""What tests of several rooms build alike."""

from __future__ import annotations

from typing import Any

from pipeline.data.fold import Provenance
from pipeline.data.manifest import Fingerprint, Tower


def fingerprint(resolution: int = 64, context_length: int = 24, **changes: Any) -> Fingerprint:
    """A fingerprint of no real encoder, with fields of one's own."""
    values: dict[str, Any] = {
        "autoencoder_weights": "w",
        "autoencoder_config": "c",
        "precision": "float32",
        "tiling": False,
        "normalisation": "n",
        "resize_filter": "lanczos",
        "crop_rule": "centre",
        "resolution": resolution,
        "buckets": ((resolution, resolution),),
        "max_upscale": 2.0,
        "flip": False,
        "background": (255, 255, 255),
        "filters": "{}",
        "text_mode": "joint",
        "text_padding": "full",
        "text_precision": "float32",
        "text_towers": (Tower(name="clip", tokenizer="t", context_length=context_length),),
        "caption_field": "caption",
        "dtype": "float16",
        "holdout": 0.1,
    }
    return Fingerprint(**{**values, **changes})


def provenance(**changes: Any) -> Provenance:
    """What `fold` is told of a data set that no encoder made."""
    values: dict[str, Any] = {
        "fingerprint": fingerprint(),
        "images": ("images",),
        "shard_name_parts": 1,
        "autoencoder": "s3://b/vae",
        "latent_channels": 2,
        "downsampling_factor": 8,
    }
    return Provenance(**{**values, **changes})
