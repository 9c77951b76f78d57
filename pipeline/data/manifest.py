"""The records beside the latents: receipt of one shard, fingerprint, manifest. Pure data; neither torch nor numpy.

A record's JSON is canonical (sorted keys, shortest float that reads back): whoever folds the same receipts writes the
same bytes. A change of the fields is a new `FORMAT_VERSION`.

Legend: C latent channels, h and w sides of the latent, z a latent drawn from its posterior N(mean, exp(logvar)).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DataError
from pipeline.storage import Store, read_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
EMPTY_TOKENS = "empty.tokens.clip.npy"  # token ids of the empty prompt, uint16 [context_length]
RECEIPT_SUFFIX = ".receipt.json"  # follows the latent shard's whole name: 00000.tar.receipt.json

Split = Literal["train", "holdout"]
Range = tuple[int, int]  # [first, end)
Environment = dict[str, str | int]


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value alone. Raises ValueError on NaN and infinity."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


class Record(BaseModel):
    """A frozen model with canonical JSON bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def to_bytes(self) -> bytes:
        """Canonical JSON, the same for equal records."""
        return canonical(self.model_dump(mode="json"))


class Fingerprint(Record):
    """Everything that changes the meaning of the latents' and tokens' bytes, by name."""

    autoencoder_weights: str  # hash of all parameters
    autoencoder_config: str  # digest
    normalisation: str  # from bytes to the autoencoder's input
    resize_filter: str
    crop_rule: str
    resolution: int
    background: tuple[int, int, int]
    text_mode: str
    tokenizer: str  # digest
    context_length: int
    text_padding: str
    caption_field: str
    dtype: str
    holdout: float

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def difference(self, other: Fingerprint) -> list[str]:
        """Names of the fields that differ, in order of declaration; empty when both mean the same."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


class BucketRange(Record):
    """Where the samples of one picture size stand in a shard, in file order."""

    bucket: tuple[int, int]  # height, width in pixels
    train: Range
    holdout: Range


class Block(Record):
    """A run of samples that can be read and checked alone; it never crosses a range's border."""

    first_sample: int
    samples: int
    offset: int  # bytes from the start of the tar
    length: int
    crc32: int


class Statistics(Record):
    """Float64 sums over the training samples, per latent channel, of the stored (float16) values."""

    count: int  # elements of each channel: samples * h * w
    sum: tuple[float, ...]  # [C] of the posterior means
    sum_squares: tuple[float, ...]  # [C] of their squares
    sum_variance: tuple[float, ...]  # [C] of exp(logvar)

    @classmethod
    def total(cls, parts: Sequence[Statistics]) -> Statistics:
        """The sums over several shards, rounded once. Parts without samples do not count."""
        parts = [p for p in parts if p.count]

        def add(field: str) -> tuple[float, ...]:
            columns = zip(*(getattr(p, field) for p in parts), strict=True)
            return tuple(math.fsum(column) for column in columns)

        return cls(
            count=sum(p.count for p in parts),
            sum=add("sum"),
            sum_squares=add("sum_squares"),
            sum_variance=add("sum_variance"),
        )

    def mean(self) -> tuple[float, ...]:
        """Mean of z over the training set, [C]."""
        return tuple(s / self.count for s in self.sum)

    def std(self) -> tuple[float, ...]:
        """Standard deviation of z, [C]; law of total variance: E[mean^2] + E[exp(logvar)] - (E mean)^2."""
        columns = zip(self.mean(), self.sum_squares, self.sum_variance, strict=True)
        return tuple(math.sqrt(max(s / self.count + v / self.count - m * m, 0.0)) for m, s, v in columns)


class Reject(Record):
    """A sample that could not be used."""

    key: str
    reason: str


class Receipt(Record):
    """What one latent shard holds. It is written after the shard: a shard counts once its receipt is there."""

    format_version: int = FORMAT_VERSION
    shard: str  # name of the latent tar, beside the receipt
    source: str  # name of the image shard
    source_bytes: int
    source_sha256: str
    fingerprint: str  # digest
    bytes: int
    sha256: str
    buckets: tuple[BucketRange, ...]  # none when every sample was rejected
    blocks: tuple[Block, ...]
    statistics: Statistics
    rejects: tuple[Reject, ...]
    environment: Environment

    def ranges(self, split: Split) -> list[Range]:
        """The split's non-empty sample ranges, in file order."""
        found = [bucket.train if split == "train" else bucket.holdout for bucket in self.buckets]
        return [(first, end) for first, end in found if end > first]


class BucketCount(Record):
    """How many samples of one picture size a shard has."""

    bucket: tuple[int, int]
    train: int
    holdout: int


class ShardEntry(Record):
    """One latent shard as the manifest lists it; a shard may have no sample at all, or none to train on."""

    name: str
    receipt: str
    source: str
    buckets: tuple[BucketCount, ...]
    bytes: int
    sha256: str

    def samples(self, split: Split) -> int:
        """Samples of the split, over all buckets."""
        return sum(bucket.train if split == "train" else bucket.holdout for bucket in self.buckets)


class Manifest(Record):
    """A whole latent data set. Names of shards and receipts are relative to the manifest's folder."""

    format_version: int = FORMAT_VERSION
    fingerprint: Fingerprint
    content_hash: str
    autoencoder: str  # where the encoder was read from
    latent_channels: int
    latent_side: int
    downsampling_factor: int
    context_length: int
    shards: tuple[ShardEntry, ...]  # in the order of their sources
    mean: tuple[float, ...]  # [C] of z over the training samples
    std: tuple[float, ...]  # [C]
    rejects: dict[str, int]  # reason -> samples
    attribution: str = ""  # whom the pictures are by, under which licence
    environments: tuple[Environment, ...]  # distinct versions and hardware of the workers

    def samples(self, split: Split) -> int:
        """Samples of the split, over all shards."""
        return sum(shard.samples(split) for shard in self.shards)


def content_hash(shards: Sequence[ShardEntry]) -> str:
    """SHA-256 of the shard list (names, content, counts, order), hexadecimal."""
    return hashlib.sha256(canonical([shard.model_dump(mode="json") for shard in shards])).hexdigest()


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


def fold(
    receipts: Sequence[Receipt],
    fingerprint: Fingerprint,
    *,
    autoencoder: str,
    latent_channels: int,
    downsampling_factor: int,
    attribution: str = "",
) -> Manifest:
    """One manifest of all receipts, given in the order of their sources.

    Raises:
        DataError: no sample to train on.
    """
    shards = tuple(shard_entry(receipt) for receipt in receipts)
    rejects = Counter(reject.reason for receipt in receipts for reject in receipt.rejects)
    statistics = Statistics.total([receipt.statistics for receipt in receipts])
    if not statistics.count:
        said = (
            ", ".join(f"{reason}: {count}" for reason, count in sorted(rejects.items()))
            or "all are held out, or the shards are empty"
        )
        raise DataError(f"no picture is left to train on ({said})", "look at the source shards and at images.holdout")
    if 0.0 in (std := statistics.std()):
        raise DataError(
            f"latent channel {std.index(0.0)} has the same value everywhere, so it cannot be whitened",
            "use another autoencoder, or fewer latent_channels",
        )
    environments = {canonical(receipt.environment): receipt.environment for receipt in receipts}
    return Manifest(
        fingerprint=fingerprint,
        content_hash=content_hash(shards),
        autoencoder=autoencoder,
        latent_channels=latent_channels,
        latent_side=fingerprint.resolution // downsampling_factor,
        downsampling_factor=downsampling_factor,
        context_length=fingerprint.context_length,
        shards=shards,
        mean=statistics.mean(),
        std=std,
        rejects=dict(rejects),
        attribution=attribution,
        environments=tuple(environments[name] for name in sorted(environments)),
    )


def load_manifest(url: str) -> Manifest:
    """Read a manifest by its full address.

    Raises:
        StorageError: it is not there.
        DataError: not JSON, of a newer format, or a field is missing.
    """
    return _parse(Manifest, read_file(url), url)


def load_receipt(store: Store, name: str) -> Receipt:
    """Read the receipt `name` (`00000.tar.receipt.json`) beside its shard. Raises as `load_manifest`."""
    return _parse(Receipt, store.read(name), f"{store.url.rstrip('/')}/{name}")


_Versioned = TypeVar("_Versioned", Manifest, Receipt)


def _parse(kind: type[_Versioned], data: bytes, where: str) -> _Versioned:
    what = kind.__name__.lower()
    remedy = (
        "give the address of a manifest, or run `lathe encode` again"
        if kind is Manifest
        else "delete it, and run `lathe encode` again: its shard alone is encoded anew"
    )
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON", remedy) from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{where} is not a {what}: it has no format_version", remedy)
    if version > FORMAT_VERSION:
        raise DataError(
            f"{where} has format version {version}, this Lathe reads up to {FORMAT_VERSION}",
            "install a newer lathe-ldm",
        )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        said = "is missing" if first["type"] == "missing" else first["msg"]
        raise DataError(f"{where} is not a usable {what}: field {field}: {said}", remedy) from error
