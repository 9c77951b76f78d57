"""Manifests and receipts of data sets that nobody encoded, and how large their samples would be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pipeline.data.fold import content_hash
from pipeline.data.manifest import (
    MANIFEST,
    RECEIPT_SUFFIX,
    Block,
    Bucket,
    BucketCount,
    BucketRange,
    Fingerprint,
    Manifest,
    Receipt,
    ShardEntry,
    Statistics,
    pack_hashes,
)
from pipeline.data.tar import TarBuilder
from pipeline.encode.latent_shard import EncodedSample, Text
from pipeline.operate.bench.device import SimulatedDevice
from pipeline.operate.bench.scaling.epoch import Blocks

_RESOLUTION, _CHANNELS, _FACTOR = 256, 4, 8
_CAPTION = "a photograph of two wooden boats on a lake in the evening"
TEXTS: dict[str, Text] = {
    "token ids": {"tokens.clip": np.zeros(77, np.uint16)},
    "CLIP-H embeddings": {"text.clip": np.zeros((77, 1024), np.float16)},
}
"""What stands beside a latent, by what it is called on the page."""


def sample_bytes(text: Text) -> int:
    """What one sample of 256 px with one caption takes in a latent shard."""
    side = _RESOLUTION // _FACTOR
    sample = EncodedSample(
        key="000012345",
        captions=(_CAPTION,),
        bucket=(_RESOLUTION, _RESOLUTION),
        moments=np.zeros((2 * _CHANNELS, side, side), np.float16),
        flipped=None,
        text=(text,),
        size=np.zeros(6, np.int32),
    )
    tar = TarBuilder()
    for name, data in sample.members("00000.tar"):
        tar.add(name, data)
    return tar.size


def sizes_by_bucket(samples: int, buckets: int) -> dict[Bucket, int]:
    """A shard's samples, as evenly by aspect ratio as can be."""
    borders = [samples * i // buckets for i in range(buckets + 1)]
    return {(_RESOLUTION, _RESOLUTION + 64 * i): borders[i + 1] - borders[i] for i in range(buckets)}


def write_manifest(folder: Path, shards: int, samples: int, buckets: int) -> str:
    """A manifest.json of many equal shards; returns its address."""
    sizes = sizes_by_bucket(samples, buckets)
    counts = tuple(BucketCount(bucket=bucket, train=size, holdout=0) for bucket, size in sizes.items())
    shard_bytes, entries = samples * sample_bytes(TEXTS["token ids"]), []
    for number in range(shards):
        name = f"{number:06d}.tar"
        entries.append(
            ShardEntry(
                name=name,
                receipt=name + RECEIPT_SUFFIX,
                source=name,
                buckets=counts,
                bytes=shard_bytes,
                sha256=hashlib.sha256(name.encode()).hexdigest(),
            )
        )
    return _write(folder, entries, sizes)


def write_receipts(folder: Path, shards: int, samples: int, buckets: int, block_samples: int) -> str:
    """The same for a few shards, with a true receipt of each; returns the manifest's address."""
    blocks = Blocks(block_samples, sample_bytes(TEXTS["token ids"]))
    url = write_manifest(folder, shards, samples, buckets)
    for number in range(shards):
        receipt = _receipt(f"{number:06d}.tar", sizes_by_bucket(samples, buckets), blocks)
        (folder / (receipt.shard + RECEIPT_SUFFIX)).write_bytes(receipt.to_bytes())
    return url


def _write(folder: Path, entries: list[ShardEntry], sizes: dict[Bucket, int]) -> str:
    manifest = Manifest(
        fingerprint=_fingerprint(sizes),
        content_hash=content_hash(entries),
        images=("simulated",),
        shard_name_parts=1,
        autoencoder="simulated",
        latent_channels=_CHANNELS,
        downsampling_factor=_FACTOR,
        scaling_factor=1.0,
        shift_factor=0.0,
        shards=tuple(entries),
        mean=(0.0,) * _CHANNELS,
        std=(1.0,) * _CHANNELS,
        rejects={},
        environments=(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return str(folder / MANIFEST)


def _fingerprint(sizes: dict[Bucket, int]) -> Fingerprint:
    return SimulatedDevice(_RESOLUTION, 0.0).fingerprint(_RESOLUTION).model_copy(update={"buckets": tuple(sizes)})


def _receipt(name: str, sizes: dict[Bucket, int], blocks: Blocks) -> Receipt:
    ranges, rows, first = [], [], 0
    for bucket, size in sizes.items():
        end = first + size
        ranges.append(BucketRange(bucket=bucket, train=(first, end), holdout=(end, end)))
        rows += [(at, min(blocks.samples, end - at)) for at in range(first, end, blocks.samples)]
        first = end
    hashes = np.random.default_rng(0).integers(0, 2**64, first, dtype=np.uint64)
    return Receipt(
        shard=name,
        source=name,
        source_bytes=0,
        source_sha256="",
        fingerprint=_fingerprint(sizes).digest(),
        bytes=first * blocks.sample_bytes,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        buckets=tuple(ranges),
        blocks=tuple(
            Block(
                first_sample=at,
                samples=count,
                offset=at * blocks.sample_bytes,
                length=count * blocks.sample_bytes,
                crc32=2**31,
            )
            for at, count in rows
        ),
        keys=pack_hashes(hashes.tolist()),
        statistics=Statistics(count=first, sum=(0.0,), sum_squares=(0.0,), sum_variance=(1.0,)),
        rejects=(),
        environment={},
    )
