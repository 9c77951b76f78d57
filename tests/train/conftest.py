"""Hand-made latents: made-up moments, real shards, receipts and manifest."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import fingerprint, provenance
from training_run import Run, end_all, finish

from pipeline.data.fold import fold
from pipeline.data.manifest import (
    EMPTY_PREFIX,
    MANIFEST,
    RECEIPT_SUFFIX,
    Block,
    BucketRange,
    Fingerprint,
    Receipt,
    Statistics,
    key_hash,
    pack_hashes,
)
from pipeline.data.tar import TarBuilder, npy_bytes

CHANNELS, SIDE, LENGTH, SAMPLES, HELD_OUT, BLOCK = 4, 4, 8, 40, 8, 8
FINGERPRINT = fingerprint(resolution=SIDE * 8, context_length=LENGTH, holdout=0.0)


def write_latents(
    folder: Path,
    fingerprint: Fingerprint = FINGERPRINT,
    seed: int = 0,
    change: Callable[[int, NDArray[np.float16]], None] | None = None,
    held_out: int = HELD_OUT,
) -> str:
    """One shard and its manifest; returns the manifest's address. `change` gets each sample's number and moments."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = SAMPLES + held_out
    rng, tar, offsets = np.random.default_rng(seed), TarBuilder(), []
    for i in range(samples):
        moments = rng.standard_normal((2 * CHANNELS, SIDE, SIDE)).astype(np.float16)
        if change is not None:
            change(i, moments)
        offsets.append(tar.add(f"{i:04d}.latent.npy", npy_bytes(moments)))
        tar.add(f"{i:04d}.tokens0.clip.npy", npy_bytes(rng.integers(1, 49408, LENGTH).astype(np.uint16)))
        tar.add(f"{i:04d}.size.npy", npy_bytes(np.zeros(6, np.int32)))
        tar.add(f"{i:04d}.json", json.dumps({"captions": [str(i)]}).encode())
    data = tar.finish()
    ends = [*offsets[BLOCK::BLOCK], tar.size]
    blocks = [
        Block(
            first_sample=i * BLOCK, samples=BLOCK, offset=start, length=end - start, crc32=zlib.crc32(data[start:end])
        )
        for i, (start, end) in enumerate(zip(offsets[::BLOCK], ends, strict=True))
    ]
    ones = (1.0,) * CHANNELS
    receipt = Receipt(
        shard="00000.tar",
        source="00000.tar",
        source_bytes=0,
        source_sha256="",
        fingerprint=fingerprint.digest(),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        buckets=(BucketRange(bucket=(SIDE * 8, SIDE * 8), train=(0, SAMPLES), holdout=(SAMPLES, samples)),),
        blocks=tuple(blocks),
        keys=pack_hashes(key_hash(f"{i:04d}") for i in range(samples)),
        statistics=Statistics(count=1, sum=(0.0,) * CHANNELS, sum_squares=ones, sum_variance=ones),
        rejects=(),
        environment={},
    )
    manifest = fold([receipt], provenance(fingerprint=fingerprint, latent_channels=CHANNELS))
    (folder / receipt.shard).write_bytes(data)
    (folder / (receipt.shard + RECEIPT_SUFFIX)).write_bytes(receipt.to_bytes())
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    empty = io.BytesIO()
    np.save(empty, np.zeros(LENGTH, np.uint16))
    (folder / f"{EMPTY_PREFIX}tokens.clip.npy").write_bytes(empty.getvalue())
    return str(folder / MANIFEST)


@pytest.fixture(autouse=True)
def _no_command_stays() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def latents(tmp_path: Path) -> str:
    """Address of a manifest over 40 samples, and 8 that are held out."""
    return write_latents(tmp_path / "latents")


@pytest.fixture(scope="session")
def make_latents():
    """`write_latents`, for other ones."""
    return write_latents


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, make_latents) -> Run:
    """A run of two ranks from the first step to the last; each of its steps is saved."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(folder, make_latents(folder / "latents"))
    run.said = finish(run.launch("checkpoint.every=1", "checkpoint.keep=100"))
    return run
