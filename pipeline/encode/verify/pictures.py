"""Stored latents beside their source pictures: encoded afresh for comparison, decoded for the eye.

Legend: C latent channels, h and w sides of the latent.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.config import EncodeConfig, EncodeImagesConfig
from pipeline.console import printable
from pipeline.data import images
from pipeline.data.manifest import Manifest
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.encode.encoder import find_device
from pipeline.encode.sources import find_sources
from pipeline.encode.verify.report import Notes, Status
from pipeline.encode.verify.sample import Stored, size_text
from pipeline.errors import LatheError
from pipeline.latents import LOG_VARIANCE_RANGE
from pipeline.models import autoencoder
from pipeline.storage import open_stream

MEAN_LIMIT = {"float32": 0.02}  # of the root mean square difference of means, in standard deviations of the latents
LOG_VARIANCE_LIMIT = {"float32": 0.1}  # of that of log-variances
_COARSE_MEAN, _COARSE_LOG_VARIANCE = 0.2, 1.0  # where the latents were made in bfloat16 or float16
PSNR_LIMIT = 0.5  # dB that the stored latent may decode worse than the fresh one
_POOR_PSNR = 15.0  # dB under which the autoencoder itself is in doubt
_SHEET_SIDE = 256  # longest side of a picture in the contact sheet, in pixels
_LABEL_WIDTH = 64  # pixels that a label needs


@dataclass(frozen=True)
class Compared:
    """A stored latent against its source picture."""

    stored: Stored
    source: images.Pixels  # [H, W, 3], brought to the bucket
    decoded: images.Pixels  # of the stored mean
    mean_difference: float  # root mean square, in standard deviations of the latents
    log_variance_difference: float  # root mean square
    largest: float  # difference of means, in standard deviations of the posterior
    psnr: float  # dB, of the decoded picture
    psnr_fresh: float  # dB, where the fresh latent is decoded

    def measures(self) -> dict[str, Any]:
        """For the report's JSON; None for what is infinite or NaN."""
        names = ("mean_difference", "log_variance_difference", "largest", "psnr", "psnr_fresh")
        values = {name: getattr(self, name) for name in names}
        figures = {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}
        return {"shard": self.stored.shard, "key": self.stored.key, "bucket": list(self.stored.bucket), **figures}


def find_pictures(
    manifest: Manifest, folder: str, images: str | Sequence[str] | None, notes: Notes, *, wanted: bool
) -> dict[str, str]:
    """Addresses of the image shards by name; none where they are out of reach, which `notes` tell."""
    place = manifest.images if images is None else images
    try:
        settings = EncodeImagesConfig(
            shards=place if isinstance(place, str) else tuple(place),
            resolution=manifest.fingerprint.resolution,
            shard_name_parts=manifest.shard_name_parts,
        )
        found = find_sources(EncodeConfig(images=settings, autoencoder=manifest.autoencoder, output=folder))
    except LatheError as error:
        notes.add("sources", error.message, "fail" if wanted else "warn")
        return {}
    except ValidationError as error:
        notes.add("sources", error.errors(include_url=False)[0]["msg"], "fail" if wanted else "warn")
        return {}
    return {source.name: source.url for source in found}


def find_autoencoder(
    manifest: Manifest, place: str | None, notes: Notes, *, wanted: bool
) -> autoencoder.AutoencoderKL | None:
    """The autoencoder that the latents were made with; None where it is out of reach, which `notes` tell."""
    try:
        model = autoencoder.load(place or manifest.autoencoder)
    except LatheError as error:
        notes.add("autoencoder", error.message, "fail" if wanted else "warn")
        return None
    found, noted = autoencoder.weights_hash(model), manifest.fingerprint.autoencoder_weights
    if found != noted:
        notes.add("autoencoder", f"its weights have the hash {found[:16]}..., the fingerprint's is {noted[:16]}...")
    for name, one, other in (
        ("latent channels", int(model.config.latent_channels), manifest.latent_channels),
        ("pixels a latent", autoencoder.downscale(model), manifest.downsampling_factor),
    ):
        if one != other:
            notes.add("autoencoder", f"it has {one} {name}, the manifest says {other}")
            return None
    return model


class PictureCheck:
    """Compares samples with their sources.

    Args:
        manifest: how they were encoded.
        model: the autoencoder.
        sources: addresses of the image shards by name.
        notes: where is told what does not hold, as `sources` and `pictures`.
        wanted: it was asked for: what cannot be compared fails, else it is warned of.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: autoencoder.AutoencoderKL,
        sources: Mapping[str, str],
        notes: Notes,
        *,
        wanted: bool,
    ) -> None:
        self._manifest, self._sources, self._notes = manifest, sources, notes
        self._unreached: Status = "fail" if wanted else "warn"
        self._device, self._model = find_device(os.environ), model
        if manifest.fingerprint.tiling:
            self._model.enable_tiling()

    def run(self, samples: Sequence[Stored]) -> Iterator[Compared]:
        """Each sample whose source picture is found; what hinders one is noted, and the others follow."""
        by_source: dict[str, list[Stored]] = {}
        for stored in samples:
            by_source.setdefault(stored.source, []).append(stored)
        for source, wanted in sorted(by_source.items()):
            if source not in self._sources:
                said = f"{source}: not among the image shards, so {len(wanted)} pictures were not compared"
                self._notes.add("sources", said, "warn")
                continue
            try:
                found = self._pictures(source, {stored.key for stored in wanted})
            except LatheError as error:
                self._notes.add("sources", f"{source}: {error.message}", self._unreached)
                continue
            for stored in wanted:
                picture = found.get(stored.key)
                if picture is None:
                    self._notes.add("sources", f"{source}: there is no picture {stored.key!r} in it any more")
                elif (compared := self._tried(stored, picture)) is not None:
                    yield compared

    def _tried(self, stored: Stored, picture: ImageSample) -> Compared | None:
        """The comparison, where the machine is up to it."""
        try:
            return self._compare(stored, picture)
        except LatheError as error:
            said = error.message
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            said = f"not compared, since {self._device} is out of memory"
        self._notes.add("pictures", f"{stored.shard}: {stored.key!r}: {said}", self._unreached)
        return None

    def _pictures(self, source: str, keys: set[str]) -> dict[str, ImageSample]:
        """The samples of these keys; the shard is read as far as the last of them."""
        found: dict[str, ImageSample] = {}
        with open_stream(self._sources[source]) as stream:
            for sample in read_image_shard(stream, self._manifest.fingerprint.caption_field):
                if isinstance(sample, ImageSample) and sample.key in keys:
                    found.setdefault(sample.key, sample)
                    if len(found) == len(keys):
                        break
        return found

    def _compare(self, stored: Stored, picture: ImageSample) -> Compared | None:
        where = f"{stored.shard}: {stored.key!r}"
        if stored.bucket not in self._manifest.fingerprint.buckets:
            self._notes.add("pictures", f"{where} is of bucket {size_text(stored.bucket)}, none of the fingerprint's")
            return None
        found, wanted = stored.moments, self._manifest.latent_shape(stored.bucket)
        if found.shape != wanted or found.dtype != np.float16:
            said = f"has a latent of {found.dtype} {list(found.shape)}, not float16 {list(wanted)}"
            self._notes.add("pictures", f"{where} {said}")
            return None
        try:
            whole = images.decode(picture.image_bytes, self._manifest.fingerprint.background)
        except images.ImageError as error:
            self._notes.add("sources", f"{stored.source}: the picture {stored.key!r} is unusable now ({error.reason})")
            return None
        if not set(stored.captions) <= set(picture.captions):
            self._notes.add("pictures", f"{where} has captions that its source picture has not")
        if not np.array_equal(stored.size, images.size_record(whole.shape[0], whole.shape[1], stored.bucket)):
            self._notes.add("pictures", f"{where} notes sizes {stored.size.tolist()}, which its source picture has not")
        pixels = images.cover(whole, stored.bucket)
        self._check_flip(where, stored, pixels)
        return self._check(where, self._measured(stored, pixels))

    def _measured(self, stored: Stored, pixels: images.Pixels) -> Compared:
        fresh = self._encode(pixels)
        mean, log_variance, largest = self._differences(stored.moments, fresh)
        decoded, again = self._decode(stored.moments), self._decode(fresh)
        return Compared(
            stored=stored,
            source=pixels,
            decoded=decoded,
            mean_difference=mean,
            log_variance_difference=log_variance,
            largest=largest,
            psnr=psnr(decoded, pixels),
            psnr_fresh=psnr(again, pixels),
        )

    def _check(self, where: str, compared: Compared) -> Compared:
        self._check_differences(where, compared.mean_difference, compared.log_variance_difference)
        if not compared.psnr >= compared.psnr_fresh - PSNR_LIMIT:
            said = f"decodes at {compared.psnr:.1f} dB, encoded afresh at {compared.psnr_fresh:.1f} dB"
            self._notes.add("pictures", f"{where} {said}")
        return compared

    def _check_flip(self, where: str, stored: Stored, pixels: images.Pixels) -> None:
        flipped, moments = stored.flipped, stored.moments
        if flipped is not None and (flipped.dtype, flipped.shape) == (moments.dtype, moments.shape):
            fresh = self._encode(np.ascontiguousarray(pixels[:, ::-1]))
            mean, log_variance, _ = self._differences(flipped, fresh)
            self._check_differences(f"{where} (mirrored)", mean, log_variance)

    def _check_differences(self, where: str, mean: float, log_variance: float) -> None:
        precision = self._manifest.fingerprint.precision
        if not mean <= MEAN_LIMIT.get(precision, _COARSE_MEAN):
            said = f"is {mean:.3g} standard deviations from what the autoencoder makes of its picture"
            self._notes.add("pictures", f"{where} {said}")
        elif not log_variance <= LOG_VARIANCE_LIMIT.get(precision, _COARSE_LOG_VARIANCE):
            self._notes.add("pictures", f"{where} has log-variances that are off by {log_variance:.3g}")

    def _differences(self, stored: NDArray[np.float16], fresh: NDArray[np.float16]) -> tuple[float, float, float]:
        """Of means, of log-variances, and the largest of means in posterior standard deviations."""
        channels = self._manifest.latent_channels
        one, other = stored.astype(np.float64), fresh.astype(np.float64)
        off = one[:channels] - other[:channels]
        spread = np.array(self._manifest.std).reshape(-1, 1, 1)
        log_variance = other[channels:].clip(*LOG_VARIANCE_RANGE)
        log_off = one[channels:].clip(*LOG_VARIANCE_RANGE) - log_variance
        return _rms(off / spread), _rms(log_off), float(np.abs(off / np.exp(log_variance / 2)).max())

    @torch.inference_mode()
    def _encode(self, pixels: images.Pixels) -> NDArray[np.float16]:
        model = self._model.to(self._device)
        moments = autoencoder.encode_moments(model, images.normalise(pixels[None]).to(self._device))
        stored: NDArray[np.float16] = autoencoder.to_float16(moments)[0].cpu().numpy()
        return stored

    @torch.inference_mode()
    def _decode(self, moments: NDArray[np.float16]) -> images.Pixels:
        mean = torch.from_numpy(moments[: self._manifest.latent_channels].astype(np.float32))[None]
        pixels: images.Pixels = images.to_uint8(autoencoder.decode(self._model, mean.to(self._device)))[0]
        return pixels


def check_quality(compared: Sequence[Compared], notes: Notes) -> None:
    """Warn where even fresh latents decode to little like the pictures."""
    fresh = statistics.mean(one.psnr_fresh for one in compared)
    if fresh < _POOR_PSNR:
        said = f"the autoencoder gives pictures back at {fresh:.1f} dB only, encoded afresh: is it the one you mean?"
        notes.add("pictures", said, "warn")


def psnr(one: images.Pixels, other: images.Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures, in dB; at most that of one wrong level in a million."""
    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / max(float(error), 1e-6)))


def sheet(compared: Sequence[Compared]) -> bytes:
    """Source with its key | decoded with its PSNR, for each sample, three samples in a row, as a PNG file."""
    pairs = [(_small(one.source), _small(one.decoded), one) for one in compared]
    height, width = (max(pair[0].shape[axis] for pair in pairs) for axis in (0, 1))
    width = max(width, _LABEL_WIDTH)
    pictures, labels = [], []
    for source, decoded, one in pairs:
        pictures += [_on_white(source, height, width), _on_white(decoded, height, width)]
        labels += [printable(one.stored.key, one_line=True), f"{one.psnr:.1f} dB"]
    return images.contact_sheet(pictures, columns=6, labels=labels)


def _small(pixels: images.Pixels) -> images.Pixels:
    height, width = pixels.shape[:2]
    factor = _SHEET_SIDE / max(height, width)
    return (
        pixels if factor >= 1 else images.cover(pixels, (max(round(height * factor), 1), max(round(width * factor), 1)))
    )


def _on_white(pixels: images.Pixels, height: int, width: int) -> images.Pixels:
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))
