"""Peak memory of jobs that differ in their number of image shards alone, each job in a process of its own.

Of two kinds: shards of a few tiny pictures, encoded from first to last; and shards of 10,000 samples, as img2dataset
cuts them, which earlier runs have encoded: the job reads every receipt twice and folds the manifest. The first shows
what a shard leaves behind in each stage, the second what grows with its samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.data.manifest import RECEIPT_SUFFIX, Block, BucketRange, Receipt, Reject, Statistics, pack_hashes
from pipeline.encode.claim import Target, claim
from pipeline.encode.job import EncodeSummary, encode
from pipeline.encode.sources import Source, find_sources
from pipeline.errors import SetupError
from pipeline.operate.bench.device import SimulatedDevice
from pipeline.operate.bench.peak import peak_bytes
from pipeline.operate.bench.pictures import write_shards
from pipeline.operate.bench.runs import job_config
from pipeline.storage import open_store

_SIDE = 32  # of the pictures, in pixels
_SOURCE_BYTES, _LATENT_BYTES = 500_000_000, 80_000_000  # what the sparse files seem to have
_BLOCK_SAMPLES = 64
_REJECTS = 100  # samples for one that was rejected


@dataclass(frozen=True)
class MemorySizes:
    """Numbers of shards, fewer and more; and what is in each.

    The fewer are many enough to have behind them what grows in a few large steps and belongs to no shard: below about
    1,000 shards, Python's table of interned strings, through which every path's name goes, is twice made anew.
    """

    tiny_shards: tuple[int, int] = (1200, 3200)
    tiny_samples: int = 4
    finished_shards: tuple[int, int] = (1500, 3500)
    finished_samples: int = 10_000
    buckets: int = 9  # picture sizes in a finished shard


def measure_memory(sizes: MemorySizes, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes of peak memory for each added source shard, of both kinds of job, and the larger of the two.

    Args:
        sizes: how many shards, of what.
        folder: an empty one on a local disk.
        say: told what is going on.

    Raises:
        SetupError: the system does not tell a process's peak memory.
    """
    peak_bytes()  # where that is not known, it is told before anything is written
    tiny = []
    for shards in sizes.tiny_shards:
        say(f"memory: a job over {shards} shards of {sizes.tiny_samples} pictures")
        root = folder / f"tiny-{shards}"
        write_shards(open_store(str(root / "images")), shards, sizes.tiny_samples, _SIDE, distinct=8)
        tiny.append(_measured(root, encoded=shards))
    finished = []
    for shards in sizes.finished_shards:
        say(f"memory: a job over {shards} finished shards of {sizes.finished_samples} samples")
        root = folder / f"finished-{shards}"
        write_finished(root, shards, sizes.finished_samples, sizes.buckets)
        finished.append(_measured(root, encoded=0))
    jobs = {
        "tiny_shards": _grown(sizes.tiny_shards, tiny),
        "finished_shards": _grown(sizes.finished_shards, finished),
    }
    return {"bytes_per_added_shard": max(job["bytes_per_added_shard"] for job in jobs.values()), **jobs}


def write_finished(root: Path, shards: int, samples: int, buckets: int = 1) -> None:
    """Image shards and their latent shards, sparse files of the right size, and true receipts.

    Args:
        root: gets the folders `images` and `latents`.
        shards: how many.
        samples: in each.
        buckets: picture sizes that they are of.
    """
    (root / "images").mkdir(parents=True)
    for number in range(shards):
        _write_sparse(root / "images" / f"{number:05d}.tar", _SOURCE_BYTES)
    config = _config(root)
    (target,) = claim(config, SimulatedDevice(_SIDE, 0.0))
    template = _template(target, samples, buckets).to_bytes()
    for source in find_sources(config):
        _write_sparse(root / "latents" / source.shard, _LATENT_BYTES)
        receipt = root / "latents" / (source.shard + RECEIPT_SUFFIX)
        receipt.write_bytes(_filled(template, source))


def _write_sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _template(target: Target, samples: int, buckets: int) -> Receipt:
    """A receipt with names in capitals, to be filled in: making each one anew takes minutes."""
    rng = np.random.default_rng(0)
    borders = [samples * i // buckets for i in range(buckets + 1)]
    sums = tuple(rng.uniform(1.0, 2.0, target.encoding.latent_channels).tolist())
    return Receipt(
        shard="SHARD",
        source="SOURCE",
        source_bytes=_SOURCE_BYTES,
        source_sha256=rng.bytes(32).hex(),
        source_version="VERSION",
        fingerprint=target.digest,
        bytes=_LATENT_BYTES,
        sha256=rng.bytes(32).hex(),
        buckets=tuple(
            BucketRange(bucket=(_SIDE, 8 * (i + 1)), train=(first, end), holdout=(end, end))
            for i, (first, end) in enumerate(pairwise(borders))
        ),
        blocks=tuple(
            Block(first_sample=first, samples=_BLOCK_SAMPLES, offset=512 * first, length=512 * _BLOCK_SAMPLES, crc32=i)
            for i, first in enumerate(range(0, samples, _BLOCK_SAMPLES))
        ),
        keys=pack_hashes(rng.integers(0, 2**64, samples, dtype=np.uint64).tolist()),
        statistics=Statistics(count=samples, sum=sums, sum_squares=tuple(4 * x for x in sums), sum_variance=sums),
        rejects=tuple(Reject(key=f"{i:09d}", reason="damaged_image") for i in range(samples // _REJECTS)),
        environment=SimulatedDevice.environment,
    )


def _filled(template: bytes, source: Source) -> bytes:
    names = {"SHARD": source.shard, "SOURCE": source.name, "VERSION": source.version}
    for name, value in names.items():
        template = template.replace(f'"{name}"'.encode(), f'"{value}"'.encode())
    return template


def _measured(root: Path, encoded: int) -> int:
    """The peak of a job in a process of its own, in bytes."""
    command = [sys.executable, "-m", __name__, str(root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"the process that was to be measured failed: {done.stderr[-500:]}", "see what it says")
    told = json.loads(done.stdout)
    if told["encoded"] != encoded:
        raise AssertionError(f"{told['encoded']} shards were encoded, and {encoded} were to be")
    return int(told["peak_bytes"])


def _grown(shards: tuple[int, int], peaks: list[int]) -> dict[str, Any]:
    per_shard = (peaks[1] - peaks[0]) / (shards[1] - shards[0])
    return {"shards": list(shards), "peak_bytes": peaks, "bytes_per_added_shard": per_shard}


def _config(root: Path) -> EncodeConfig:
    return job_config(str(root), _SIDE, batch_size=8).model_copy(update={"threads": 1})


def encode_folder(root: Path) -> EncodeSummary:
    """A job over a folder's shards, with a device that takes no time."""
    return encode(_config(root), encoder=SimulatedDevice(_SIDE, 0.0))


if __name__ == "__main__":
    summary = encode_folder(Path(sys.argv[1]))
    print(json.dumps({"encoded": summary.encoded, "peak_bytes": peak_bytes()}))  # noqa: T201
