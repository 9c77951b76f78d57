"""`lathe bench encode`: is the device ever idle, and does memory grow with the data?

(a) A simulated device: a fixed service time per picture that uses no CPU, at 1.1 times the host's own work per picture,
so that a tenth of the host's time is all the slack there is. The job's rate over the device's is the share of the time
that the device was kept busy. Beside it the usual loop: fetch, decode, encode, write in turn.
(b) The architecture of Stable Diffusion's autoencoder with random weights on this machine's own device.
(c) Peak memory over the number of source shards.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.manifest import RECEIPT_SUFFIX, Environment, Fingerprint, Tower
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.encode.encoder import Encoder
from pipeline.encode.job import EncodesAndDescribes, encode
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity
from pipeline.encode.sources import find_sources
from pipeline.models.text import Tokenizer
from pipeline.operate.bench.pictures import write_shards
from pipeline.operate.bench.setting import setting
from pipeline.storage import open_store, open_stream

Say = Callable[[str], None]
DEVICE_OVER_HOST = 1.1


@dataclass(frozen=True)
class EncodeBench:
    """Sizes of the benchmark."""

    root: str = ""  # folder or s3:// prefix for shards and latents; empty = a temporary folder
    shards: int = 12
    per_shard: int = 512
    picture_side: int = 512
    resolution: int = 256
    batch_size: int = 32
    repeats: int = 3
    real_pictures: int = 48
    memory_shards: tuple[int, int] = (200, 2200)


class SimulatedDevice:
    """An encoder whose device takes a fixed time per picture, one batch after another, and none of the host's.

    Args:
        resolution: of the pictures, in pixels.
        seconds: per picture; 0 = the host is all that takes time.
    """

    channels, downsampling_factor, scaling_factor, shift_factor = 4, 8, 0.18215, 0.0
    environment: Environment = {"device": "simulated"}  # noqa: RUF012

    def __init__(self, resolution: int, seconds: float) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        side = resolution // self.downsampling_factor
        rng = np.random.default_rng(0)
        self._moments = rng.normal(size=(2 * self.channels, side, side)).astype(np.float16)
        self._tokenizer = Tokenizer(77)

    def fingerprint(self, resolution: int) -> Fingerprint:
        """Of no real encoder."""
        return Fingerprint(
            autoencoder_weights="simulated",
            autoencoder_config="simulated",
            precision="float32",
            tiling=False,
            normalisation=images.NORMALISATION,
            resize_filter=images.RESIZE_FILTER,
            crop_rule=images.CROP_RULE,
            resolution=resolution,
            buckets=((resolution, resolution),),
            max_upscale=2.0,
            flip=False,
            background=(255, 255, 255),
            filters="{}",
            text_mode="joint",
            text_padding="full",
            text_precision="float32",
            text_towers=(Tower(name="clip", tokenizer="simulated", context_length=77),),
            caption_field="caption",
            dtype="float16",
            holdout=0.0,
        )

    def empty(self) -> dict[str, npt.NDArray[Any]]:
        """Token ids of the empty prompt."""
        return {"tokens.clip": self._tokenizer.empty}

    def text(self, captions: Sequence[str]) -> list[dict[str, npt.NDArray[Any]]]:
        """Real token ids."""
        return [{"tokens.clip": row} for row in self._tokenizer(captions)]

    def start(self, pixels: images.Pixels, flip: bool) -> _Served:
        """Queue a batch; it is done when the ones before it and its own service time have passed."""
        del flip
        self._free_at = max(time.monotonic(), self._free_at) + len(pixels) * self._seconds
        return _Served(self._free_at, np.broadcast_to(self._moments, (len(pixels), *self._moments.shape)))


@dataclass(frozen=True)
class _Served:
    done_at: float
    moments: npt.NDArray[np.float16]

    def result(self) -> tuple[npt.NDArray[np.float16], None]:
        time.sleep(max(0.0, self.done_at - time.monotonic()))
        return self.moments, None


def bench_encode(bench: EncodeBench = EncodeBench(), say: Say = lambda text: None) -> dict[str, Any]:
    """Every figure of the benchmark, with the machine and the sizes.

    Raises:
        StorageError: the folder or prefix cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        root = (bench.root or folder).rstrip("/")
        say(f"writing {bench.shards * bench.per_shard} pictures of {bench.picture_side} px in {bench.shards} shards")
        written = write_shards(open_store(f"{root}/images"), bench.shards, bench.per_shard, bench.picture_side)
        simulated = _simulated(bench, root, say)
        real = _real(bench, root, Path(folder), say)
        memory = _memory(bench, Path(folder), say)
    return {
        "bench": "encode",
        "encode_over_device": simulated["job_over_device"],
        "bytes_per_added_shard": memory["bytes_per_added_shard"],
        "simulated_device": simulated,
        "sd_autoencoder": real,
        "memory": memory,
        "image_bytes": written,
        "sizes": asdict(bench),
        "setting": setting(),
    }


def _config(bench: EncodeBench, root: str, output: str, **fields: Any) -> EncodeConfig:
    return EncodeConfig(
        images={"shards": f"{root}/images", "resolution": bench.resolution},  # type: ignore[arg-type]
        autoencoder="simulated",
        output=f"{root}/{output}",
        batch_size=bench.batch_size,
        metrics={"prometheus": False},  # type: ignore[arg-type]
        **fields,
    )


def _simulated(bench: EncodeBench, root: str, say: Say) -> dict[str, Any]:
    """Host alone, job and naive loop in turn, so that a noisy neighbour meets all of them."""
    pictures = bench.shards * bench.per_shard
    rounds = []
    for number in range(bench.repeats):
        say(f"simulated device, round {number + 1} of {bench.repeats}")
        host = _job(_config(bench, root, f"host-{number}"), SimulatedDevice(bench.resolution, 0.0)) / pictures
        service = DEVICE_OVER_HOST * host
        job = _job(_config(bench, root, f"job-{number}"), SimulatedDevice(bench.resolution, service)) / pictures
        naive_host = naive(_config(bench, root, f"naive-host-{number}"), SimulatedDevice(bench.resolution, 0.0), 2)
        loop = naive(_config(bench, root, f"naive-{number}"), SimulatedDevice(bench.resolution, service), 2)
        rounds.append(
            {
                "host_seconds": host,
                "device_seconds": service,
                "job_seconds": job,
                "naive_host_seconds": naive_host,
                "naive_seconds": loop,
                "job_over_device": service / job,
                "naive_over_device": service / loop,
            }
        )
    return {**_medians(rounds), "device_over_host": DEVICE_OVER_HOST, "rounds": rounds}


def _job(config: EncodeConfig, encoder: EncodesAndDescribes) -> float:
    """Seconds of the whole job, listing and manifest included."""
    begun = time.perf_counter()
    encode(config, encoder=encoder)
    return time.perf_counter() - begun


def naive(config: EncodeConfig, encoder: EncodesAndDescribes, shards: int) -> float:
    """Seconds per picture of the usual loop over a few shards: fetch, decode, encode and write, one after the other."""
    side = int(config.images.resolutions[0])
    store, pictures = open_store(config.output), 0
    begun = time.perf_counter()
    for source in find_sources(config)[:shards]:
        with open_stream(source.url) as stream:
            samples = [s for s in read_image_shard(stream) if isinstance(s, ImageSample)]
            identity = SourceIdentity(source.name, stream.bytes_read, stream.sha256())
        shard = LatentShard(source.name, encoder.channels, config.block_samples)
        for first in range(0, len(samples), config.batch_size):
            batch = samples[first : first + config.batch_size]
            whole = [images.decode(sample.image_bytes) for sample in batch]
            pixels = np.stack([images.cover(picture, (side, side)) for picture in whole])
            moments, _ = encoder.start(pixels, False).result()
            for sample, picture, latent in zip(batch, whole, moments, strict=True):
                size = images.size_record(picture.shape[0], picture.shape[1], (side, side))
                text = tuple(encoder.text(sample.captions))
                encoded = EncodedSample(sample.key, sample.captions, (side, side), latent, None, text, size)
                shard.add(encoded, holdout=False)
        data, receipt = shard.finish(source.shard, identity, "naive", encoder.environment)
        store.write(receipt.shard, data)
        store.write(receipt.shard + RECEIPT_SUFFIX, receipt.to_bytes())
        pictures += len(samples)
    return (time.perf_counter() - begun) / pictures


def _real(bench: EncodeBench, root: str, folder: Path, say: Say) -> dict[str, Any]:
    """The SD autoencoder's architecture: the bare model on pictures in memory, the job, the naive loop."""
    say(f"Stable Diffusion's autoencoder at {bench.resolution} px, {bench.real_pictures} pictures")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder / "autoencoder")
    per_shard = bench.real_pictures // 2
    write_shards(open_store(f"{root}/few/images"), 2, per_shard, bench.picture_side)
    batch = min(8, per_shard)
    small = EncodeBench(resolution=bench.resolution, batch_size=batch)
    fields = {"autoencoder": str(folder / "autoencoder")}
    config = _config(small, f"{root}/few", "job").model_copy(update=fields)
    encoder = Encoder(config)
    pixels = np.zeros((batch, bench.resolution, bench.resolution, 3), np.uint8)
    encoder.start(pixels, False).result()  # first calls set things up
    begun = time.perf_counter()
    for _ in range(bench.real_pictures // batch):
        encoder.start(pixels, False).result()
    bare = (time.perf_counter() - begun) / (bench.real_pictures // batch * batch)
    job = _job(config, encoder) / (2 * per_shard)
    loop = naive(_config(small, f"{root}/few", "naive").model_copy(update=fields), encoder, 2)
    return {
        "pictures": 2 * per_shard,
        "batch_size": batch,
        "model_seconds": bare,
        "job_seconds": job,
        "naive_seconds": loop,
        "job_over_model": bare / job,
        "naive_over_model": bare / loop,
    }


def _memory(bench: EncodeBench, folder: Path, say: Say) -> dict[str, Any]:
    """Peak resident memory of two jobs that differ in their number of shards alone, each in a process of its own."""
    peaks = []
    for shards in bench.memory_shards:
        say(f"memory: {shards} source shards")
        write_shards(open_store(str(folder / f"memory-{shards}" / "images")), shards, 8, 32, distinct=8)
        command = [sys.executable, "-m", __name__, str(folder / f"memory-{shards}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(json.loads(done.stdout)["peak_bytes"]))
    fewer, more = bench.memory_shards
    return {
        "shards": [fewer, more],
        "peak_bytes": peaks,
        "bytes_per_added_shard": (peaks[1] - peaks[0]) / (more - fewer),
    }


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def _peak(root: str) -> int:
    """Encode a folder's shards with a device that takes no time; this process's peak of resident memory, in bytes."""
    bench = EncodeBench(resolution=32, batch_size=8)
    encode(_config(bench, root, "latents", threads=1), encoder=SimulatedDevice(32, 0.0))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _peak(sys.argv[1])}))  # noqa: T201
