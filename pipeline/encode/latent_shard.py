"""One latent shard in the making: its tar, its blocks, its statistics, and at the end its receipt.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import (
    Block,
    Bucket,
    BucketRange,
    Environment,
    Receipt,
    Reject,
    Statistics,
    canonical,
    key_hash,
    pack_hashes,
)
from pipeline.data.tar import TarBuilder, npy_bytes
from pipeline.latents import LOG_VARIANCE_RANGE

Text = dict[str, NDArray[Any]]
"""One caption by "KIND.TOWER": tokens uint16 [L], text float16 [L, D], or pooled float16 [D]."""


@dataclass(frozen=True)
class EncodedSample:
    """What one picture and its captions became."""

    key: str
    captions: tuple[str, ...]
    bucket: Bucket
    moments: NDArray[np.float16]  # [2C, h, w]: posterior mean, then log-variance, raw
    flipped: NDArray[np.float16] | None  # of the mirrored picture; None = not asked for
    text: tuple[Text, ...]  # of each caption
    size: NDArray[np.int32]  # [6], see images.size_record

    def members(self, source: str) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the sample's files, in their order; `source` is the image shard's name."""
        yield f"{self.key}.latent.npy", npy_bytes(self.moments)
        if self.flipped is not None:
            yield f"{self.key}.latent_flip.npy", npy_bytes(self.flipped)
        for i, caption in enumerate(self.text):
            for name, values in caption.items():
                kind, _, tower = name.partition(".")
                yield f"{self.key}.{kind}{i}.{tower}.npy", npy_bytes(values)
        yield f"{self.key}.size.npy", npy_bytes(self.size)
        about = {"bucket": self.bucket, "source_shard": source, "source_key": self.key}
        yield f"{self.key}.json", canonical({"captions": self.captions, **about})


@dataclass(frozen=True)
class SourceIdentity:
    """The image shard that the latents are from."""

    name: str
    bytes: int
    sha256: str
    version: str = ""  # see Receipt.source_version


class LatentSums:
    """Statistics of training samples.

    Each bucket is summed by itself, sample by sample, then the buckets in order of size. So the samples may come with
    their buckets mixed, and whoever reads them back from the finished shard gets the same floats.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._count = 0
        self._buckets: dict[Bucket, NDArray[np.float64]] = {}  # [3, C]: of mean, mean^2, exp(logvar)

    def add(self, bucket: Bucket, moments: NDArray[np.float16]) -> None:
        """Count one sample's finite moments, [2C, h, w]."""
        values = moments.astype(np.float64, order="C").reshape(2 * self._channels, -1)
        mean, logvar = values[: self._channels], values[self._channels :].clip(*LOG_VARIANCE_RANGE)
        sums = self._buckets.setdefault(bucket, np.zeros((3, self._channels)))
        sums += np.stack([mean.sum(1), np.square(mean).sum(1), np.exp(logvar).sum(1)])
        self._count += mean.shape[1]

    def total(self) -> Statistics:
        """The sums so far."""
        sums = sum((self._buckets[bucket] for bucket in sorted(self._buckets)), np.zeros((3, self._channels)))
        mean, squares, variance = (tuple(row) for row in sums.tolist())
        return Statistics(count=self._count, sum=mean, sum_squares=squares, sum_variance=variance)


class _Run:
    """The samples of one bucket and split, as they come: a piece of the tar, and its blocks."""

    def __init__(self) -> None:
        self.tar = TarBuilder()
        self.hashes = array("Q")
        self.blocks: list[Block] = []  # counted from the run's own beginning

    def add(self, sample: EncodedSample, source: str, block_samples: int) -> None:
        for name, data in sample.members(source):
            self.tar.add(name, data)
        self.hashes.append(key_hash(sample.key))
        if len(self.hashes) % block_samples == 0:
            self.close_block()

    def close_block(self) -> None:
        """What came since the last block is one; call it behind the last sample too."""
        last = self.blocks[-1] if self.blocks else Block(first_sample=0, samples=0, offset=0, length=0, crc32=0)
        first, start = last.first_sample + last.samples, last.offset + last.length
        if first < len(self.hashes):
            self.blocks.append(
                Block(
                    first_sample=first,
                    samples=len(self.hashes) - first,
                    offset=start,
                    length=self.tar.size - start,
                    crc32=self.tar.crc32(start),
                )
            )


class LatentShard:
    """Collects the samples of one source shard.

    In the file the buckets stand in order of size; in each the training samples as they came, behind them the hold-out
    samples. A sample is written when it comes, so that its arrays are not kept.

    Args:
        source: name of the source shard, as each sample's KEY.json tells it.
        channels: C.
        block_samples: samples per checksummed block.
    """

    def __init__(self, source: str, channels: int, block_samples: int) -> None:
        self._source, self._block_samples = source, block_samples
        self._runs: dict[tuple[Bucket, bool], _Run] = {}  # by bucket, and whether it is held out
        self._sums = LatentSums(channels)
        self._rejects: list[Reject] = []

    def add(self, sample: EncodedSample, *, holdout: bool) -> None:
        """Take a sample with finite moments."""
        if not holdout:
            self._sums.add(sample.bucket, sample.moments)
        self._runs.setdefault((sample.bucket, holdout), _Run()).add(sample, self._source, self._block_samples)

    def reject(self, key: str, reason: str) -> None:
        """Note a sample that is not used. Of its key, bytes that are not UTF-8 are written as escapes."""
        self._rejects.append(Reject(key=key.encode("utf-8", "backslashreplace").decode(), reason=reason))

    def finish(
        self, name: str, source: SourceIdentity, fingerprint: str, environment: Environment
    ) -> tuple[memoryview, Receipt]:
        """The tar and its receipt; nothing can be added afterwards.

        Of a single run (one bucket, nothing held out) nothing is copied; else all but the first, one run at a time.

        Args:
            name: of the latent shard.
            source: identity of the source shard.
            fingerprint: digest.
            environment: what the float16 rounding may depend on.
        """
        tar, blocks, hashes = TarBuilder(), list[Block](), array("Q")
        ranges: list[BucketRange] = []
        for bucket in sorted({bucket for bucket, _ in self._runs}):
            starts = [len(hashes)]
            for holdout in (False, True):
                if run := self._runs.pop((bucket, holdout), None):
                    run.close_block()
                    blocks += [_moved(block, len(hashes), tar.size) for block in run.blocks]
                    tar.take(run.tar)
                    hashes += run.hashes
                starts.append(len(hashes))
            first, held_out, end = starts
            ranges.append(BucketRange(bucket=bucket, train=(first, held_out), holdout=(held_out, end)))
        data = tar.finish()
        return data, Receipt(
            shard=name,
            source=source.name,
            source_bytes=source.bytes,
            source_sha256=source.sha256,
            source_version=source.version,
            fingerprint=fingerprint,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            buckets=tuple(ranges),
            blocks=tuple(blocks),
            keys=pack_hashes(hashes),
            statistics=self._sums.total(),
            rejects=in_order(self._rejects),
            environment=environment,
        )


def in_order(rejects: Iterable[Reject]) -> tuple[Reject, ...]:
    """As receipts have them: not as they came, which depends on the resolutions that are left to do."""
    return tuple(sorted(rejects, key=lambda reject: (reject.key, reject.reason)))


def _moved(block: Block, samples: int, offset: int) -> Block:
    return block.model_copy(update={"first_sample": block.first_sample + samples, "offset": block.offset + offset})
