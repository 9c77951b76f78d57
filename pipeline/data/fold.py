"""Receipts into one manifest, the same bytes for the same receipts; one receipt is in memory at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from pipeline.data.manifest import (
    RECEIPT_SUFFIX,
    BucketCount,
    Environment,
    Fingerprint,
    Manifest,
    Receipt,
    ShardEntry,
    Statistics,
    canonical,
)
from pipeline.errors import DataError


def content_hash(shards: Sequence[ShardEntry]) -> str:
    """SHA-256 of the shard list (names, content, counts, order), hexadecimal."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(shard.to_bytes())
    return digest.hexdigest()


def shard_entry(receipt: Receipt) -> ShardEntry:
    """The manifest's line for one receipt."""
    counts = tuple(
        BucketCount(bucket=b.bucket, train=b.train[1] - b.train[0], holdout=b.holdout[1] - b.holdout[0])
        for b in receipt.buckets
    )
    return ShardEntry(
        name=receipt.shard,
        receipt=receipt.shard + RECEIPT_SUFFIX,
        source=receipt.source,
        buckets=counts,
        bytes=receipt.bytes,
        sha256=receipt.sha256,
    )


@dataclass(frozen=True)
class Provenance:
    """What a manifest says of the whole, beside what is folded from the receipts. Fields as in Manifest."""

    fingerprint: Fingerprint
    images: tuple[str, ...]
    shard_name_parts: int
    autoencoder: str
    latent_channels: int
    downsampling_factor: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    attribution: str = ""


class ExactSum:
    """A running sum that is rounded once, when it is read (Shewchuk 1997): the order of its parts does not matter."""

    def __init__(self) -> None:
        self._partials: list[float] = []

    def add(self, x: float) -> None:
        """Add one finite number."""
        kept = []
        for y in self._partials:
            if abs(x) < abs(y):
                x, y = y, x
            high = x + y
            if low := y - (high - x):
                kept.append(low)
            x = high
        self._partials = [*kept, x]

    def value(self) -> float:
        """The sum, correctly rounded."""
        return math.fsum(self._partials)


class _StatisticsSum:
    """Statistics of all shards, in memory of one."""

    def __init__(self) -> None:
        self._count = 0
        self._columns: dict[str, list[ExactSum]] = {}

    def add(self, part: Statistics) -> None:
        if part.count:
            self._count += part.count
            for name in ("sum", "sum_squares", "sum_variance"):
                values = getattr(part, name)
                sums = self._columns.setdefault(name, [ExactSum() for _ in values])
                for one, value in zip(sums, values, strict=True):
                    one.add(value)

    def total(self) -> Statistics:
        sums = {name: tuple(one.value() for one in column) for name, column in self._columns.items()}
        return Statistics(count=self._count, **{"sum": (), "sum_squares": (), "sum_variance": (), **sums})


def fold(receipts: Iterable[Receipt], about: Provenance) -> Manifest:
    """One manifest of all receipts, given in the order of their sources; one is in memory at a time.

    Raises:
        DataError: no sample to train on, or a latent channel that is constant.
    """
    shards: list[ShardEntry] = []
    rejects: Counter[str] = Counter()
    sums = _StatisticsSum()
    environments: dict[bytes, Environment] = {}
    for receipt in receipts:
        shards.append(shard_entry(receipt))
        rejects.update(reject.reason for reject in receipt.rejects)
        sums.add(receipt.statistics)
        environments[canonical(receipt.environment)] = receipt.environment
    statistics = sums.total()
    if not statistics.count:
        said = (
            ", ".join(f"{reason}: {count}" for reason, count in sorted(rejects.items()))
            or "all are held out, or the shards are empty"
        )
        raise DataError(
            f"no picture of {about.fingerprint.resolution} px is left to train on ({said})",
            "look at the source shards, and at images.holdout, images.filters and images.max_upscale",
        )
    if 0.0 in (std := statistics.std()):
        raise DataError(
            f"latent channel {std.index(0.0)} has the same value everywhere, so it cannot be whitened",
            "use another autoencoder, or fewer latent_channels",
        )
    return Manifest(
        content_hash=content_hash(shards),
        shards=tuple(shards),
        mean=statistics.mean(),
        std=std,
        rejects=dict(rejects),
        environments=tuple(environments[name] for name in sorted(environments)),
        **vars(about),
    )


def provenance(manifest: Manifest) -> Provenance:
    """What `fold` needs to make a manifest anew from changed receipts."""
    return Provenance(**{field.name: getattr(manifest, field.name) for field in fields(Provenance)})
