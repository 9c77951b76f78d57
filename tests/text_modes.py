"""One small data set in buckets, its captions for two text towers like SDXL's: as token ids, as embeddings, trimmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latent_set
from small_models import clip, save_clip

from pipeline.config import EncodeConfig, TrainConfig
from pipeline.encode.job import encode

LENGTH, CHANNELS = latent_set.CONTEXT, latent_set.CHANNELS
TEXTS: dict[str, dict[str, Any]] = {
    "online": {"mode": "online"},
    "cached": {"mode": "cached"},
    "trimmed": {"mode": "cached", "padding": "trimmed"},
}
UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}


def towers(place: Path) -> list[dict[str, Any]]:
    """As run files have them: the second one is wider, and has a pooled vector."""
    plain = {"layer": "penultimate", "final_norm": False}
    return [
        {"name": "clip_l", "model": str(place / "clip_l"), "pad": "end", **plain},
        {"name": "clip_g", "model": str(place / "clip_g"), "pooled": True, **plain},
    ]


def save_towers(place: Path) -> None:
    for name, seed, fields in (
        ("clip_l", 0, {"quick_gelu": True}),
        (
            "clip_g",
            1,
            {"text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2}},
        ),
    ):
        save_clip(place / name, clip(seed, **fields), **fields)


def encode_all(place: Path) -> dict[str, str]:
    """Pictures, autoencoder, towers and latents in a folder; returns the manifests' addresses by key of TEXTS."""
    latent_set.write_pictures(place / "images")
    latent_set.save_autoencoder(place / "vae")
    save_towers(place)
    found = {}
    for name, text in TEXTS.items():
        output = place / name
        settings = latent_set.encode_settings(
            place, output, {**text, "context_length": LENGTH, "towers": towers(place)}
        ).model_dump(mode="json")
        settings["images"]["resolution"] = 32
        encode(EncodeConfig.model_validate(settings))
        found[name] = f"{output}/manifest.json"
    return found


def run_file(place: Path, text: str, manifest: str, output: str = "o", **changes: Any) -> TrainConfig:
    """A run on one of them."""
    mode = TEXTS[text]["mode"]
    named = {"towers": towers(place)} if mode == "online" else {}
    return TrainConfig.model_validate(
        {
            "manifest": manifest,
            "output": output,
            "unet": UNET,
            "text": {"mode": mode, "context_length": LENGTH, **named},
            "engine": {"threads_per_rank": 1, "timeout_seconds": 60},
            "optimizer": {"warmup_steps": 3},
            "steps": 8,
            "global_batch": 8,
            "shuffle_window": 4,
            "checkpoint": {"every": 4, "keep": 9},
            "log_every": 1,
            **changes,
        }
    )
