"""One latent shard held against its receipt: bytes, blocks, samples, numbers, keys.

Legend: C latent channels, h and w sides of the latent, n samples.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Block, Bucket, Receipt, ShardEntry, Statistics, key_hash
from pipeline.data.samples import is_holdout
from pipeline.data.tar_header import BLOCK
from pipeline.encode.verify.report import Notes
from pipeline.encode.verify.sample import Parts, SampleCheck, grouped, size_text
from pipeline.encode.verify.text import TextCheck, Texts
from pipeline.errors import DataError
from pipeline.latents import LOG_VARIANCE_RANGE
from pipeline.storage.stream import Stream

_END = bytes(2 * BLOCK)  # a tar's end mark
_PIECE = 1 << 20
_TOLERANCE = 1e-9  # of float64 sums, by the order of their parts
_VARIANCE: NDArray[np.float64] = np.exp(
    np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64).clip(*LOG_VARIANCE_RANGE)
)  # of every float16 log-variance


class ShardCheck:
    """Reads one shard from its beginning to its end, one block in memory at a time.

    Args:
        texts: what all shards must be like, and their captions.
        entry: what the manifest says of this one.
        receipt: what its receipt says.
        notes: where is told what does not hold.
    """

    def __init__(self, texts: Texts, entry: ShardEntry, receipt: Receipt, notes: Notes) -> None:
        self._entry, self._receipt, self._notes = entry, receipt, notes
        self._manifest = manifest = texts.manifest
        self._text = TextCheck(texts, self._fail)
        self._samples = SampleCheck(manifest, receipt.source, self._text, self._fail)
        self._noted_hashes = receipt.hashes()
        self._sums = np.zeros((3, manifest.latent_channels))  # of mean, mean^2, exp(logvar)
        self._count = 0
        self._whole = True  # every sample could be read, and its numbers are finite
        self.hashes: array[int] = array("Q")  # of the keys found

    @property
    def numbers(self) -> int:
        """Floats looked at."""
        return self._samples.numbers

    @property
    def captions(self) -> int:
        """Captions looked at."""
        return self._text.captions

    def run(self, stream: Stream) -> None:
        """Hold the whole shard against the receipt. Raises StorageError."""
        self._check_ranges()
        for block in self._receipt.blocks:
            if block.offset != stream.bytes_read or block.first_sample != len(self.hashes) or block.length <= 0:
                self._fail("blocks", f"the block at sample {block.first_sample} does not follow the one before it")
                break
            data = stream.read(block.length)
            if len(data) < block.length:
                self._fail("blocks", f"the file ends in {_range(block)}")
                break
            self._check_block(block, data)
        tail = b""
        while piece := stream.read(_PIECE):
            tail = (tail + piece)[: len(_END) + 1]
        self._check_end(tail, stream.sha256())

    def _check_end(self, tail: bytes, digest: str) -> None:
        if tail != _END:
            self._fail("blocks", "behind the last block is not the tar's end mark alone")
        if digest != self._entry.sha256:
            self._fail("checksums", f"SHA-256 is {digest[:16]}..., the manifest says {self._entry.sha256[:16]}...")
        if len(self.hashes) != self._receipt.samples():
            self._fail("split", f"{len(self.hashes)} samples, the receipt says {self._receipt.samples()}")
        elif self._whole:
            self._check_statistics()

    def _check_ranges(self) -> None:
        """The receipt's ranges of samples tile the shard, by bucket in order of size, held-out samples last."""
        at, last = 0, (0, 0)
        for part in self._receipt.buckets:
            tiled = part.train[0] == at <= part.train[1] == part.holdout[0] <= part.holdout[1]
            if not tiled or part.bucket <= last:
                self._fail(
                    "split", f"the receipt's range of bucket {size_text(part.bucket)} does not follow the one before"
                )
            if part.bucket not in self._manifest.fingerprint.buckets:
                self._fail("split", f"bucket {size_text(part.bucket)} is none of the fingerprint's")
            at, last = part.holdout[1], part.bucket
        if len(self._noted_hashes) != at:
            self._fail("keys", f"the receipt has {len(self._noted_hashes)} keys for {at} samples")

    def _check_block(self, block: Block, data: bytes) -> None:
        if zlib.crc32(data) != block.crc32:
            self._fail("checksums", f"{_range(block)}: the checksum is not the receipt's")
        try:
            samples = grouped(data)
        except DataError as error:
            self._fail("samples", f"{_range(block)}: {error.message}")
            samples = []
        if len(samples) != block.samples:
            self._fail("samples", f"{_range(block)}: {len(samples)} samples, the receipt says {block.samples}")
        place = self._place(block)
        moments = []
        for key, parts in samples:
            found = self._check_sample(key, parts, *place) if place else None
            self._whole &= found is not None
            moments.append(found)
            self._note_key(key)
        missing = block.samples - len(samples)  # their noted keys stand in, so that the next block is not blamed
        self._whole &= not missing
        first = len(self.hashes)
        self.hashes.extend(self._noted_hashes[first : first + max(missing, 0)])
        if place and not place[1]:
            self._sum([values for values in moments if values is not None])

    def _place(self, block: Block) -> tuple[Bucket, bool] | None:
        """The bucket of a block's samples, and whether they are held out."""
        end = block.first_sample + block.samples
        for part in self._receipt.buckets:
            for holdout, (first, last) in ((False, part.train), (True, part.holdout)):
                if first <= block.first_sample < end <= last:
                    return part.bucket, holdout
        self._fail("blocks", f"{_range(block)} lie in no range of a bucket and split")
        self._whole = False
        return None

    def _check_sample(self, key: str, parts: Parts, bucket: Bucket, holdout: bool) -> NDArray[np.float16] | None:
        if is_holdout(key, self._manifest.fingerprint.holdout) != holdout:
            self._fail("split", f"{key!r} stands among the {'held-out' if holdout else 'training'} samples, wrongly")
        return self._samples.moments(key, parts, bucket)

    def _note_key(self, key: str) -> None:
        number, hashed = len(self.hashes), key_hash(key)
        if number >= len(self._noted_hashes) or self._noted_hashes[number] != hashed:
            self._fail("keys", f"sample {number} is {key!r}, the receipt has another key there")
        self.hashes.append(hashed)

    def _sum(self, samples: Sequence[NDArray[np.float16]]) -> None:
        if not samples:
            return
        moments = np.stack(samples)  # [n, 2C, h, w]
        means = np.ascontiguousarray(moments[:, : moments.shape[1] // 2]).astype(np.float32)
        variances = _VARIANCE[moments[:, moments.shape[1] // 2 :].view(np.uint16)]
        self._sums[0] += means.sum((0, 2, 3), dtype=np.float64)
        self._sums[1] += np.square(means).sum((0, 2, 3), dtype=np.float64)  # exact: float16 has 11 bits, float32 24
        self._sums[2] += variances.sum((0, 2, 3))
        self._count += means.size // means.shape[1]

    def _check_statistics(self) -> None:
        noted = self._receipt.statistics
        found = Statistics(
            count=self._count,
            **dict(zip(("sum", "sum_squares", "sum_variance"), map(tuple, self._sums.tolist()), strict=True)),
        )
        if noted.count != found.count:
            self._fail("statistics", f"{found.count} numbers a channel, the receipt says {noted.count}")
        scale = np.sqrt(self._count * self._sums[1]) + 1e-12  # the sum of means may be near zero
        for name, least in (("sum", scale), ("sum_squares", 0), ("sum_variance", 0)):
            one, other = np.array(getattr(found, name)), np.array(getattr(noted, name))
            if one.shape != other.shape:
                self._fail("statistics", f"{name} of {len(other)} channels, the manifest says {len(one)}")
                continue
            off = np.abs(one - other) > _TOLERANCE * np.maximum(np.abs(one), least)
            if off.any():
                c = int(off.argmax())
                self._fail("statistics", f"{name} of channel {c} is {one[c]:.9g}, the receipt says {other[c]:.9g}")

    def _fail(self, check: str, said: str) -> None:
        self._notes.add(check, f"{self._entry.name}: {said}")


def _range(block: Block) -> str:
    return f"samples {block.first_sample} to {block.first_sample + block.samples - 1}"
