"""`lathe bench encode`: does memory grow with the data, and is the device ever idle?

(a) Peak memory over the number of image shards.
(b) A simulated device: a fixed service time per picture that uses no CPU, at 1.1 times the host's own work per picture,
so that a tenth of the host's time is all the slack there is. The host's own work is the whole job with a device that
takes no time; the quickest of all rounds counts, so that a disturbed one cannot make the device slower. The job's rate
over the device's is the share of the time that the device was kept busy.
(c) The architecture of Stable Diffusion's autoencoder on this machine's own device, beside the bare model.

The usual loop stands beside the job in both. What is compared is run in turn, so that a noisy neighbour meets all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import ConfigError
from pipeline.operate.bench.device import SimulatedDevice
from pipeline.operate.bench.memory import MemorySizes, measure_memory
from pipeline.operate.bench.pictures import write_shards
from pipeline.operate.bench.runs import Round, delete_below, job_config, named, timed_job, timed_naive, told
from pipeline.operate.bench.sd_autoencoder import AutoencoderSizes, measure_autoencoder
from pipeline.operate.bench.setting import setting
from pipeline.storage import open_store

DEVICE_OVER_HOST = 1.1

Say = Callable[[str], None]


@dataclass(frozen=True)
class SimulatedSizes:
    """How much is encoded with the simulated device."""

    shards: int = 12
    per_shard: int = 512
    naive_shards: int = 2  # of these, what the usual loop does
    batch_size: int = 32
    picture_side: int = 512  # pixels
    resolution: int = 256


@dataclass(frozen=True)
class EncodeBench:
    """Sizes of the benchmark."""

    root: str = ""  # folder or s3:// prefix for shards and latents; empty = a temporary folder
    repeats: int = 3
    simulated: SimulatedSizes = field(default_factory=SimulatedSizes)
    autoencoder: AutoencoderSizes = field(default_factory=AutoencoderSizes)
    memory: MemorySizes = field(default_factory=MemorySizes)


SIZES = {
    "small": EncodeBench(
        repeats=2,
        simulated=SimulatedSizes(shards=4, per_shard=128, naive_shards=1),
        autoencoder=AutoencoderSizes(per_shard=2, batch_size=2),
        memory=MemorySizes(tiny_shards=(1200, 2200), finished_shards=(1500, 2500)),
    ),
    "standard": EncodeBench(),
    "large": EncodeBench(
        repeats=5,
        simulated=SimulatedSizes(shards=40, per_shard=1024),
        autoencoder=AutoencoderSizes(per_shard=64, batch_size=16),
        memory=MemorySizes(tiny_shards=(1200, 11_200), finished_shards=(1500, 11_500)),
    ),
}


def sized(name: str, root: str = "", repeats: int | None = None) -> EncodeBench:
    """The benchmark of one of `SIZES`. Raises ConfigError where there is none of that name."""
    if name not in SIZES:
        raise ConfigError(f"--size {name}: unknown", f"use one of {', '.join(SIZES)}")
    bench = replace(SIZES[name], root=root)
    return bench if repeats is None else replace(bench, repeats=repeats)


def bench_encode(bench: EncodeBench = EncodeBench(), say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure of the benchmark, with the machine and the sizes.

    Raises:
        StorageError: the folder or prefix cannot be written.
        SetupError: the system does not tell a process's peak memory.
    """
    about = setting()  # before there is any load of our own
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        memory = measure_memory(bench.memory, Path(folder) / "memory", say)
        with own_folder(bench.root or folder) as root:
            simulated = _simulated(bench.simulated, f"{root}/simulated", bench.repeats, say)
            place = Path(folder) / "autoencoder"
            real = measure_autoencoder(bench.autoencoder, f"{root}/real", place, bench.repeats, say)
    return {
        "bench": "encode",
        "encode_over_device": simulated["median"]["job_over_device"],
        "bytes_per_added_shard": memory["bytes_per_added_shard"],
        "simulated_device": simulated,
        "sd_autoencoder": real,
        "memory": memory,
        "sizes": asdict(bench),
        "setting": about,
    }


@contextmanager
def own_folder(root: str) -> Iterator[str]:
    """A new folder below an address, so that no job finds what an earlier one has left; deleted in the end."""
    url = f"{root.rstrip('/')}/bench-encode-{uuid4().hex[:12]}"
    try:
        yield url
    finally:
        delete_below(url)


def _simulated(sizes: SimulatedSizes, root: str, repeats: int, say: Say) -> dict[str, Any]:
    """The host alone in all rounds, then job and usual loop in turn against the device that follows from it."""
    pictures, naive_shards = sizes.shards * sizes.per_shard, min(sizes.naive_shards, sizes.shards)
    say(f"writing {pictures} pictures of {sizes.picture_side} px in {sizes.shards} shards")
    written = write_shards(open_store(f"{root}/images"), sizes.shards, sizes.per_shard, sizes.picture_side)
    config = job_config(root, sizes.resolution, sizes.batch_size)

    def job(seconds: float) -> Round:
        return timed_job(config, SimulatedDevice(sizes.resolution, seconds), sizes.shards)

    say("simulated device: the host alone, to warm up")
    job(0.0)
    host = []
    for number in range(repeats):
        say(f"simulated device: the host alone, round {number + 1} of {repeats}")
        host.append(job(0.0))
    device = DEVICE_OVER_HOST * min(one["seconds"] for one in host)
    rounds = []
    for number in range(repeats):
        say(f"simulated device of {device * 1e3:.2f} ms a picture, round {number + 1} of {repeats}")
        runs = {
            "job": job(device),
            "naive": timed_naive(config, SimulatedDevice(sizes.resolution, device), naive_shards),
        }
        ratios = {f"{name}_over_device": device / run["seconds"] for name, run in runs.items()}
        rounds.append({**named(host=host[number], **runs), **ratios})
    return {
        "pictures": pictures,
        "image_bytes": written,
        "device_over_host": DEVICE_OVER_HOST,
        "device_seconds": device,
        **told(rounds),
    }
