"""One latent shard without the samples that were taken down: the other samples' bytes as they were."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.data.manifest import Block, BucketRange, Receipt, Reject, key_hash, pack_hashes
from pipeline.data.samples import split_name
from pipeline.data.tar import members, read_npy
from pipeline.data.tar_header import BLOCK
from pipeline.encode.latent_shard import LatentSums, in_order
from pipeline.encode.takedown.keys import REASON
from pipeline.errors import DataError

_AGAIN = "delete shard and receipt, and run `lathe encode` again: this shard alone is encoded anew, without the samples"
_LATENT = "latent.npy"


@dataclass(frozen=True)
class _Sample:
    hash: int  # of its key
    data: memoryview  # its members, headers included
    latent: memoryview  # its latent.npy


def without(data: bytes, receipt: Receipt, keys: Mapping[int, str]) -> tuple[bytes, Receipt]:
    """The shard and its receipt without some samples, as if these had never been encoded; memory of two shards.

    Args:
        data: the shard, as its receipt has it, or with samples besides: a writer may have been killed between receipt
            and shard.
        receipt: the one that is there.
        keys: the samples' keys by their hashes.

    Raises:
        DataError: the shard is neither, to the last byte of what the receipt has.
    """
    try:
        there = _verified(_samples(memoryview(data)), receipt)
    except DataError as error:
        raise DataError(f"{receipt.shard} is not what its receipt says: {error.message}", _AGAIN) from error
    kept = {number: sample for number, sample in enumerate(there) if sample.hash not in keys}
    rewritten = b"".join([*(sample.data for sample in kept.values()), bytes(2 * BLOCK)])
    buckets = tuple(_ranges(receipt, list(kept)))
    samples = list(kept.values())
    sums = LatentSums(len(receipt.statistics.sum))
    for part in buckets:
        for sample in samples[part.train[0] : part.train[1]]:
            sums.add(part.bucket, read_npy(sample.latent))
    removed = (Reject(key=keys[hashed], reason=REASON) for hashed in receipt.hashes() if hashed in keys)
    changes = {
        "bytes": len(rewritten),
        "sha256": hashlib.sha256(rewritten).hexdigest(),
        "buckets": buckets,
        "blocks": tuple(_blocks(samples, buckets, max((block.samples for block in receipt.blocks), default=1))),
        "keys": pack_hashes(sample.hash for sample in samples),
        "statistics": sums.total(),
        "rejects": in_order((*receipt.rejects, *removed)),
    }
    return rewritten, receipt.model_copy(update=changes)


def _samples(view: memoryview) -> Iterator[_Sample]:
    """The samples of a whole tar, each from the end of the one before it. Raises DataError."""
    key, start, end, latent = "", 0, 0, memoryview(b"")
    for name, offset, size in members(view, whole=True):
        following, extension = split_name(name)
        if end and (following != key or (extension == _LATENT and latent)):
            yield _Sample(key_hash(key), view[start:end], latent)
            start, latent = end, memoryview(b"")
        key, end = following, offset + size + -size % BLOCK
        if extension == _LATENT:
            latent = view[offset : offset + size]
    if end:
        yield _Sample(key_hash(key), view[start:end], latent)


def _verified(found: Iterable[_Sample], receipt: Receipt) -> list[_Sample]:
    """The receipt's samples, once they alone are seen to have its checksum. Raises DataError."""
    hashes = receipt.hashes()
    known = set(hashes)
    there = [sample for sample in found if sample.hash in known]
    for number, hashed in enumerate(hashes):
        if number >= len(there) or there[number].hash != hashed:
            raise DataError(f"sample {number} is missing")
    digest = hashlib.sha256()
    for sample in there:
        digest.update(sample.data)
    digest.update(bytes(2 * BLOCK))
    if digest.hexdigest() != receipt.sha256:
        raise DataError("its checksum is another")
    return there


def _ranges(receipt: Receipt, kept: list[int]) -> Iterator[BucketRange]:
    """The buckets that have samples left, counted anew; `kept` are their numbers in the receipt."""
    at = 0
    for part in receipt.buckets:
        train = sum(part.train[0] <= number < part.train[1] for number in kept)
        holdout = sum(part.holdout[0] <= number < part.holdout[1] for number in kept)
        if train + holdout:
            yield BucketRange(bucket=part.bucket, train=(at, at + train), holdout=(at + train, at + train + holdout))
        at += train + holdout


def _blocks(samples: list[_Sample], buckets: tuple[BucketRange, ...], most: int) -> Iterator[Block]:
    """Blocks of `most` samples, cut anew within each range: so the encoder would have cut them."""
    offset = 0
    for first, end in (span for part in buckets for span in (part.train, part.holdout)):
        for start in range(first, end, most):
            inside = samples[start : min(start + most, end)]
            length, crc32 = 0, 0
            for sample in inside:
                length += len(sample.data)
                crc32 = zlib.crc32(sample.data, crc32)
            yield Block(first_sample=start, samples=len(inside), offset=offset, length=length, crc32=crc32)
            offset += length
