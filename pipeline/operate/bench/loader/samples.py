"""The samples that all loaders read, from a seed; and Lathe's own data set of them.

Four kinds: `text` is a latent of 8 x 32 x 32 and a text embedding of 20 x 768, both float16; `tokens` is the latent
and 77 token ids; `quarter` is the latent and a text embedding of 77 x 192, as Stable Diffusion 1.5 divided by four has
it; `numbers` are of a few bytes each and only tell which they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.fold import Provenance, fold
from pipeline.data.manifest import EMPTY_PREFIX, MANIFEST, RECEIPT_SUFFIX, Fingerprint, Receipt, Tower
from pipeline.data.tar import npy_bytes
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity, Text
from pipeline.storage import Store

KINDS = ("text", "tokens")
QUARTER = "quarter"
NUMBERS = "numbers"
FACTOR = 8
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "text": {"moments": (8, 32, 32), "text": (20, 768)},
    "tokens": {"moments": (8, 32, 32), "tokens": (77,)},
    QUARTER: {"moments": (8, 32, 32), "text": (77, 192)},
    NUMBERS: {"number": (1,)},
}
_TINY_MOMENTS = (2, 1, 1)
_CHUNK = 1024  # samples drawn at once


def write_samples(folder: Path, kind: str, count: int, seed: int = 0) -> int:
    """One .npy file for each field, [count, ...]. Returns the bytes of one sample."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    size = 0
    for name, shape in _SHAPES[kind].items():
        dtype = {"tokens": np.uint16, "number": np.int64}.get(name, np.float16)
        array = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count, *shape))
        for first in range(0, count, _CHUNK):
            part = array[first : first + _CHUNK]
            if name == "number":
                part[:] = np.arange(first, first + len(part))[:, None]
            elif name == "tokens":
                part[:] = rng.integers(0, 49_408, part.shape, dtype=np.uint16)
            else:
                part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        size += array.nbytes // count
    return size


def write_latents(samples: Path, store: Store, kind: str, *, per_shard: int, block_samples: int) -> None:
    """Latent shards of what `write_samples` wrote, as `lathe encode` writes them, with receipts and manifest."""
    fields = {path.stem: np.load(path, mmap_mode="r") for path in samples.glob("*.npy")}
    count = len(next(iter(fields.values())))
    receipts = []
    for number, first in enumerate(range(0, count, per_shard)):
        rows = range(first, min(first + per_shard, count))
        data, receipt = latent_shard(fields, rows, kind, f"{number:05d}.tar", block_samples)
        store.write(receipt.shard, data)
        store.write(receipt.shard + RECEIPT_SUFFIX, receipt.to_bytes())
        receipts.append(receipt)
    for name, row in _empty(kind).items():
        store.write(f"{EMPTY_PREFIX}{name}.npy", npy_bytes(row))
    store.write(MANIFEST, fold(receipts, provenance(kind)).to_bytes())


def _empty(kind: str) -> dict[str, NDArray[Any]]:
    """The empty prompt's text, which a training takes now and then."""
    shapes = _SHAPES[kind]
    if "text" in shapes:
        return {"text.clip": np.zeros(shapes["text"], np.float16)}
    return {"tokens.clip": np.zeros(shapes.get("tokens", (1,)), np.uint16)}


def latent_shard(
    fields: dict[str, NDArray[Any]], rows: range, kind: str, name: str, block_samples: int
) -> tuple[memoryview, Receipt]:
    """One latent shard of these rows, and its receipt."""
    shard = LatentShard(name, _moments_shape(kind)[0] // 2, block_samples)
    for sample in _encoded(fields, rows, kind):
        shard.add(sample, holdout=False)
    source = SourceIdentity(name, len(rows), hashlib.sha256(name.encode()).hexdigest())
    return shard.finish(name, source, provenance(kind).fingerprint.digest(), {"threads": 1})


def _encoded(fields: dict[str, NDArray[Any]], rows: range, kind: str) -> Iterator[EncodedSample]:
    tiny = np.random.default_rng(rows.start).standard_normal((len(rows), *_TINY_MOMENTS), dtype=np.float32)
    side = FACTOR * _moments_shape(kind)[1]
    for place, i in enumerate(rows):
        moments = fields["moments"][i] if "moments" in fields else tiny[place].astype(np.float16)
        text: Text = {"tokens.clip": fields["tokens"][i] if "tokens" in fields else np.zeros(1, np.uint16)}
        if "text" in fields:
            text = {"text.clip": fields["text"][i]}
        yield EncodedSample(
            key=f"{i:09d}",
            captions=(f"picture {i}",),
            bucket=(side, side),
            moments=moments,
            flipped=None,
            text=(text,),
            size=np.array([side, side, 0, 0, side, side], np.int32),
        )


def provenance(kind: str) -> Provenance:
    """What the manifest says of the whole. No autoencoder made these latents, and it says so."""
    channels, side, _ = _moments_shape(kind)
    length = _SHAPES[kind].get("text", _SHAPES[kind].get("tokens", (1,)))[0]
    width = _SHAPES[kind].get("text", (0, 0))[1]
    mark = Fingerprint(
        autoencoder_weights="none: random numbers",
        autoencoder_config="none",
        precision="float32",
        tiling=False,
        normalisation="none",
        resize_filter="none",
        crop_rule="none",
        resolution=FACTOR * side,
        buckets=((FACTOR * side, FACTOR * side),),
        max_upscale=1.0,
        flip=False,
        background=(0, 0, 0),
        filters="{}",
        text_mode="cached" if width else "joint",
        text_padding="full",
        text_precision="float32",
        text_towers=(Tower(name="clip", tokenizer="none", context_length=length, width=width),),
        caption_field="caption",
        dtype="float16",
        holdout=0.0,
    )
    return Provenance(
        fingerprint=mark,
        images=("random numbers",),
        shard_name_parts=1,
        autoencoder="none",
        latent_channels=channels // 2,
        downsampling_factor=FACTOR,
    )


def _moments_shape(kind: str) -> tuple[int, ...]:
    return _SHAPES[kind].get("moments", _TINY_MOMENTS)
