"""The autoencoder and the text side of one encode job, and the fingerprint of what they make.

Legend: N pictures, C latent channels, H and W sides of a picture, h and w of its latent, f the downsampling factor.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline import __version__
from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.buckets import bucket_sizes
from pipeline.data.manifest import Environment, Fingerprint, digest_of
from pipeline.encode.captions import CaptionEncoder
from pipeline.encode.claim import settings
from pipeline.encode.latent_shard import Text
from pipeline.errors import ConfigError, SetupError
from pipeline.models import autoencoder

Moments = NDArray[np.float16]  # [N, 2C, h, w]


class Encoder:
    """Pixels to posterior moments, captions to arrays, on this process's device.

    A picture's latent does not depend on the batch it is in, beyond float16's last places.

    Args:
        config: the job.
        place: of this worker among all: its GPU, where no launcher has said which.

    Raises:
        ConfigError: a picture size is no multiple of the autoencoder's downsampling factor, or a text tower is wrong.
        DataError, StorageError: the autoencoder or a text tower cannot be loaded.
        SetupError: the device does not have memory for them.
    """

    def __init__(self, config: EncodeConfig, place: int = 0) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._config = config
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or two streams at once are not reproducible
        self._device = find_device(os.environ, place)
        self._float32 = autoencoder.load(config.autoencoder)
        self._weights_hash = autoencoder.weights_hash(self._float32)
        self.channels = int(self._float32.config.latent_channels)
        self.downsampling_factor = autoencoder.downscale(self._float32)
        self.scaling_factor = float(self._float32.config.scaling_factor)
        self.shift_factor = float(self._float32.config.shift_factor or 0.0)
        self._check_buckets()
        with self._told_errors():
            self._model = self._prepare()
            self._captions = CaptionEncoder(config.text, self._device, config.batch_size)
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.environment: Environment = self._environment()
        if config.compile:
            self._compile()

    def _check_buckets(self) -> None:
        """Raise ConfigError where a picture size is no multiple of the autoencoder's downsampling factor."""
        factor, settings = self.downsampling_factor, self._config.images
        for resolution in settings.resolutions:
            for side in sorted({side for bucket in bucket_sizes(resolution, settings.buckets) for side in bucket}):
                if side % factor == 0:
                    continue
                field, value = ("buckets.step", settings.buckets.step) if settings.buckets else ("resolution", side)
                raise ConfigError(
                    f"images.{field}: {value} is not a multiple of {factor}, the autoencoder's downsampling factor",
                    f"use {value - value % factor or factor}",
                )

    def fingerprint(self, resolution: int) -> Fingerprint:
        """What the bytes mean that are made at one of the config's resolutions."""
        config = self._config
        return Fingerprint(
            autoencoder_weights=self._weights_hash,
            # Names with "_" tell where and by which version it was saved, not what it computes.
            autoencoder_config=digest_of({k: v for k, v in self._float32.config.items() if not k.startswith("_")}),
            normalisation=images.NORMALISATION,
            resize_filter=images.RESIZE_FILTER,
            crop_rule=images.CROP_RULE,
            text_towers=self._captions.towers,
            dtype="float16",
            **settings(config, resolution),
        )

    def start(self, pixels: images.Pixels, flip: bool) -> Pending:
        """Begin to encode pictures of one size. On a GPU the work is only enqueued.

        Args:
            pixels: uint8 [N, H, W, 3].
            flip: encode the mirrored pictures too.

        Raises:
            SetupError: out of memory, or the device cannot compute in this precision.
        """
        with torch.inference_mode(), self._told_errors():
            batch = images.normalise(self._to_device(pixels)).to(self._model.dtype)
            moments = self._enqueue(batch)
            flipped = self._enqueue(batch.flip(3)) if flip else None
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waiting must not take a core
            done.record(torch.cuda.current_stream(self._device))
        return Pending(self, pixels, moments, flipped, done)

    def text(self, captions: Sequence[str]) -> list[Text]:
        """What is stored of each caption, see `CaptionEncoder`. Raises SetupError when out of memory."""
        with self._told_errors():
            return self._captions(captions)

    def empty(self) -> Text:
        """What is stored of the empty prompt."""
        return self.text([""])[0]

    def finished(self, pixels: images.Pixels, moments: Tensor) -> Moments:
        """Moments on the host, those that are not finite encoded once more in float32, one picture at a time."""
        found = moments.numpy()
        if self._config.precision == "float32":
            return found
        for row in np.flatnonzero(~np.isfinite(found).all(axis=(1, 2, 3))):
            found[row] = self._again(pixels[row : row + 1])[0]
        return found

    def _enqueue(self, batch: Tensor) -> Tensor:
        """Moments float16 [N, 2C, h, w] on the host, on a GPU once its stream gets there."""
        try:
            moments = autoencoder.encode_moments(self._model, batch)
        except RuntimeError as error:
            if self._config.compile and not isinstance(error, torch.OutOfMemoryError):
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise SetupError(f"compile: torch.compile failed: {said}", "set compile=false") from error
            raise
        return autoencoder.to_float16(moments).to("cpu", non_blocking=True)  # to pinned memory of torch's own

    @torch.inference_mode()
    def _again(self, pixels: images.Pixels) -> Moments:
        with self._told_errors():
            self._float32.to(self._device)
            moments = autoencoder.encode_moments(self._float32, images.normalise(pixels).to(self._device))
            return autoencoder.to_float16(moments).cpu().numpy()

    def _to_device(self, pixels: images.Pixels) -> Tensor:
        """The pixels as they are, a quarter of the bytes that they have as floats."""
        batch = torch.from_numpy(np.ascontiguousarray(pixels))
        if self._copies is None:
            return batch
        with torch.cuda.stream(self._copies):  # beside the encoding of the batch before
            there = batch.pin_memory().to(self._device, non_blocking=True)
        encoding = torch.cuda.current_stream(self._device)
        encoding.wait_stream(self._copies)
        there.record_stream(encoding)
        return there

    def _prepare(self) -> autoencoder.AutoencoderKL:
        """The autoencoder as it runs; the float32 one stays for pictures that this one fails on."""
        config, cuda = self._config, self._device.type == "cuda"
        if config.slicing:
            self._float32.enable_slicing()
        if config.tiling:
            autoencoder.use_tiling(self._float32)
        if cuda:
            torch.cuda.set_device(self._device)
            torch.backends.cudnn.deterministic = True  # a rerun must give the same bytes
            torch.backends.cudnn.allow_tf32 = False  # which float32 would mean 10 bits of mantissa
            torch.backends.cuda.matmul.allow_tf32 = False
        if config.precision == "float32" and not config.compile:
            return self._float32.to(self._device)
        # diffusers' own `to` warns of every cast
        return nn.Module.to(copy.deepcopy(self._float32), device=self._device, dtype=getattr(torch, config.precision))

    def _compile(self) -> None:
        """Compile once for all sizes, before the first batch: what is computed must not depend on which that is."""
        self._model.encoder.compile(dynamic=True)
        settings = self._config.images
        sizes = {size for resolution in settings.resolutions for size in bucket_sizes(resolution, settings.buckets)}
        height, width = min(sizes, key=lambda size: (size[0] == size[1], size))  # a square would be a special case
        self.start(np.zeros((min(2, self._config.batch_size), height, width, 3), np.uint8), flip=False).result()

    @contextmanager
    def _told_errors(self) -> Iterator[None]:
        """What torch says of this machine's limits, in words."""
        config = self._config
        try:
            yield
        except RuntimeError as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
                raise SetupError(
                    f"out of memory on {self._device}: {said}",
                    f"lower batch_size (now {config.batch_size}), or set slicing, or tiling for large pictures",
                ) from error
            if "not implemented for" in said:
                raise SetupError(
                    f"precision: {config.precision} (text: {config.text.precision}) does not run on {self._device}:"
                    f" {said}",
                    "set precision=float32 and text.precision=float32",
                ) from error
            raise

    def _environment(self) -> Environment:
        """What the last places of float16 latents were seen to depend on."""
        config, cuda = self._config, self._device.type == "cuda"
        return {
            "lathe": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "open_clip": version("open_clip_torch"),
            "pillow": version("pillow"),
            "device": torch.cuda.get_device_name(self._device) if cuda else _processor(),
            "cuda": (torch.version.cuda or "") if cuda else "",
            "threads": 0 if cuda else torch.get_num_threads(),
            "batch_size": config.batch_size,
            "slicing": int(config.slicing),
            "compile": int(config.compile),
        }


@dataclass(frozen=True)
class Pending:
    """Pictures that are being encoded."""

    encoder: Encoder
    pixels: images.Pixels
    moments: Tensor
    flipped: Tensor | None
    done: torch.cuda.Event | None

    def result(self) -> tuple[Moments, Moments | None]:
        """Wait for the moments, raw: mean and log-variance of the posterior [N, 2C, h, w], and the mirrored pictures'.

        What is not finite in the job's precision was encoded again in float32. It stays infinite or NaN where float32
        gives that too, or float16 cannot hold it.

        Raises:
            SetupError: out of memory.
        """
        if self.done is not None:
            self.done.synchronize()
        moments = self.encoder.finished(self.pixels, self.moments)
        if self.flipped is None:
            return moments, None
        return moments, self.encoder.finished(_mirrored(self.pixels), self.flipped)


def find_device(environment: Mapping[str, str], place: int = 0) -> torch.device:
    """The GPU of this process's place on its machine (torchrun's or srun's local rank, else `place`), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or ""
    return torch.device("cuda", (int(local) if local.isdecimal() else place) % torch.cuda.device_count())


def _processor() -> str:
    """Architecture and vector instructions: what is computed with others differs in its last places."""
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _mirrored(pixels: images.Pixels) -> images.Pixels:
    return pixels[:, :, ::-1]
