"""One latent shard in the making: its tar, its blocks, its statistics, and at the end its receipt.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import Block, BucketRange, Environment, Receipt, Reject, Statistics, canonical
from pipeline.data.tar import TarBuilder, npy_bytes
from pipeline.diffusion.schedule import LOG_VARIANCE_RANGE


@dataclass(frozen=True)
class EncodedSample:
    """What one picture and its captions became."""

    key: str
    captions: tuple[str, ...]
    moments: npt.NDArray[np.float16]  # [2C, h, w]: posterior mean, then log-variance, raw
    tokens: npt.NDArray[np.uint16]  # [captions, L]
    size: npt.NDArray[np.int32]  # [6], see images.size_record


@dataclass(frozen=True)
class SourceIdentity:
    """The image shard that the latents are from."""

    name: str
    bytes: int
    sha256: str


class LatentShard:
    """Collects the samples of one source shard: training samples as they come, hold-out samples behind them.

    Args:
        source: name of the source shard, as each sample's KEY.json tells it.
        bucket: height and width of the pictures, in pixels.
        channels: C.
        block_samples: samples per checksummed block.
    """

    def __init__(self, source: str, bucket: tuple[int, int], channels: int, block_samples: int) -> None:
        self._source, self._bucket, self._channels = source, bucket, channels
        self._block_samples = block_samples
        self._tar = TarBuilder()
        self._blocks: list[Block] = []
        self._block_start, self._first, self._samples = 0, 0, 0  # byte and sample where the open block begins; samples
        self._held_out: list[EncodedSample] = []
        self._rejects: list[Reject] = []
        self._count = 0
        self._sums = np.zeros((3, channels))  # of mean, mean^2, exp(logvar)

    def add(self, sample: EncodedSample, *, holdout: bool) -> None:
        """Take a sample with finite moments."""
        if holdout:
            self._held_out.append(sample)
            return
        moments = sample.moments.astype(np.float64).reshape(2 * self._channels, -1)
        mean, logvar = moments[: self._channels], moments[self._channels :].clip(*LOG_VARIANCE_RANGE)
        self._sums += np.stack([mean.sum(1), np.square(mean).sum(1), np.exp(logvar).sum(1)])
        self._count += mean.shape[1]
        self._write(sample)

    def reject(self, key: str, reason: str) -> None:
        """Note a sample that could not be used. Of its key, bytes that are not UTF-8 are written as escapes."""
        self._rejects.append(Reject(key=key.encode("utf-8", "backslashreplace").decode(), reason=reason))

    def finish(
        self, name: str, source: SourceIdentity, fingerprint: str, environment: Environment
    ) -> tuple[bytes, Receipt]:
        """The tar and its receipt; nothing can be added afterwards.

        Args:
            name: of the latent shard.
            source: identity of the source shard.
            fingerprint: digest.
            environment: what the float16 rounding may depend on.
        """
        self._close_block()
        train = self._samples
        for sample in self._held_out:
            self._write(sample)
        self._close_block()
        data = self._tar.finish()
        ranges = BucketRange(bucket=self._bucket, train=(0, train), holdout=(train, self._samples))
        total, squares, variance = (tuple(row.tolist()) for row in self._sums)
        return data, Receipt(
            shard=name,
            source=source.name,
            source_bytes=source.bytes,
            source_sha256=source.sha256,
            fingerprint=fingerprint,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            buckets=(ranges,) if self._samples else (),
            blocks=tuple(self._blocks),
            statistics=Statistics(count=self._count, sum=total, sum_squares=squares, sum_variance=variance),
            rejects=tuple(self._rejects),
            environment=environment,
        )

    def _write(self, sample: EncodedSample) -> None:
        if self._samples - self._first == self._block_samples:
            self._close_block()
        key, about = sample.key, {"bucket": self._bucket, "source_shard": self._source, "source_key": sample.key}
        self._tar.add(f"{key}.latent.npy", npy_bytes(sample.moments))
        for i, tokens in enumerate(sample.tokens):
            self._tar.add(f"{key}.tokens{i}.clip.npy", npy_bytes(tokens))
        self._tar.add(f"{key}.size.npy", npy_bytes(sample.size))
        self._tar.add(f"{key}.json", canonical({"captions": sample.captions, **about}))
        self._samples += 1

    def _close_block(self) -> None:
        if self._samples > self._first:
            start, end = self._block_start, self._tar.size
            self._blocks.append(
                Block(
                    first_sample=self._first,
                    samples=self._samples - self._first,
                    offset=start,
                    length=end - start,
                    crc32=zlib.crc32(self._tar.view(start, end)),
                )
            )
        self._first, self._block_start = self._samples, self._tar.size
