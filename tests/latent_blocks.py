"""Blocks for tests: of a data set on disk, or put together from single members."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from latent_shards import LENGTH
from support import fingerprint

from pipeline import storage
from pipeline.data.latent_block import LatentBlock, parse_block
from pipeline.data.layout import Layout
from pipeline.data.manifest import Bucket, Fingerprint, Manifest, Tower, load_manifest
from pipeline.data.shard_plan import ShardPlan, load_plans
from pipeline.data.tar import TarBuilder, npy_bytes

BUCKET = (4, 8)
TOWERS = (
    Tower(name="clip_l", tokenizer="t", context_length=LENGTH, width=3),
    Tower(name="clip_g", tokenizer="t", context_length=LENGTH + 1, width=5, pooled_width=6),
)
JOINT = fingerprint(resolution=4, context_length=LENGTH, buckets=(BUCKET, (8, 4)))
CACHED = JOINT.model_copy(update={"text_mode": "cached", "text_towers": TOWERS, "flip": True})
TRIMMED = CACHED.model_copy(update={"text_padding": "trimmed"})
_IDS = tuple(tower.model_copy(update={"width": 0, "pooled_width": 0}) for tower in TOWERS)
ONLINE = CACHED.model_copy(update={"text_mode": "online", "text_towers": _IDS})
MARKS = {"joint": JOINT, "online": ONLINE, "cached": CACHED, "trimmed": TRIMMED}


def read_blocks(url: str, bucket: Bucket = BUCKET, *, flip: bool = True) -> tuple[list[LatentBlock], Layout]:
    """The training blocks of a data set of one shard."""
    store, manifest = storage.open_store(str(Path(url).parent)), load_manifest(url)
    layout, plan = Layout.of(manifest, bucket, flip), load_plans(store, manifest, 0, "train")[bucket]
    blocks = []
    for block, (start, length) in enumerate(zip(plan.offset.tolist(), plan.length.tolist(), strict=True)):
        blocks.append(parse_block(store.read("00000.tar", start, start + length), plan, block, layout, url))
    return blocks, layout


def layout_of(mark: Fingerprint, bucket: Bucket = BUCKET, *, flip: bool = True) -> Layout:
    """Of 2C = 4 channels, at half the picture's size; without a data set."""
    manifest = Manifest.model_construct(fingerprint=mark, latent_channels=2, downsampling_factor=2)
    return Layout.of(manifest, bucket, flip)


def parts(layout: Layout, captions: int = 1) -> dict[str, bytes]:
    """The members of a sound sample, by what follows the key."""
    rng = np.random.default_rng(captions)
    found = {"latent.npy": npy_bytes(rng.standard_normal(layout.moments).astype(np.float16))}
    if layout.flip:
        found["latent_flip.npy"] = npy_bytes(rng.standard_normal(layout.moments).astype(np.float16))
    for number in range(captions):
        for one in layout.text:
            array = one.array
            shape = (int(rng.integers(1, array.shape[0] + 1)), *array.shape[1:]) if array.trimmed else array.shape
            found[f"{one.kind}{number}.{one.tower}.npy"] = npy_bytes(rng.integers(0, 99, shape).astype(array.dtype))
    about = {"captions": [f"caption {number}" for number in range(captions)]}
    size = npy_bytes(np.array([*BUCKET, 0, 0, *BUCKET], np.int32))
    return found | {"size.npy": size, "json": json.dumps(about).encode()}


def archive(samples: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """A piece of a tar with these members, by key and what follows it."""
    tar = TarBuilder()
    for key, members in samples.items():
        for name, content in members.items():
            tar.add(f"{key}.{name}", content)
    end = tar.size
    return bytes(tar.finish()[:end])


def parse(data: bytes, layout: Layout, samples: int) -> LatentBlock:
    """A block of these bytes, by a receipt that fits them."""
    whole = {"samples": samples, "length": len(data), "crc32": zlib.crc32(data), "offset": 512}
    columns = {name: np.array([whole.get(name, 0)]) for name in ("numbers", "starts", *whole)}
    return parse_block(data, ShardPlan(first=16, **columns), 0, layout, "s3://b/00003.tar")
