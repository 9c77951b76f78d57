"""What tests of several rooms build alike."""

from __future__ import annotations

from typing import Any

from pipeline.data.manifest import Fingerprint


def fingerprint(**changes: Any) -> Fingerprint:
    """A fingerprint of no real encoder, with fields of one's own."""
    values: dict[str, Any] = {
        "autoencoder_weights": "w",
        "autoencoder_config": "c",
        "normalisation": "n",
        "resize_filter": "lanczos",
        "crop_rule": "centre",
        "resolution": 64,
        "background": (255, 255, 255),
        "text_mode": "joint",
        "tokenizer": "t",
        "context_length": 24,
        "text_padding": "full",
        "caption_field": "caption",
        "dtype": "float16",
        "holdout": 0.1,
    }
    return Fingerprint(**{**values, **changes})
