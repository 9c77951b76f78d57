"""The records beside the latents: receipt of one shard, fingerprint, manifest. Pure data; neither torch nor numpy.

A record's JSON is canonical (sorted keys, shortest float that reads back): whoever folds the same receipts writes the
same bytes. A change of the fields is a new `FORMAT_VERSION`.

Legend: C latent channels, h and w sides of the latent, z a latent drawn from its posterior N(mean, exp(logvar)).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.storage import Store, read_file

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ENCODING = "encoding.json"  # what an output was claimed for, see `encode/claim.py`
REJECTS = "rejects.jsonl"
REMOVED = "removed.txt"  # keys that were taken down, see `encode/takedown`
EMPTY_PREFIX = "empty."  # the empty prompt, as each tower has it: empty.tokens.clip.npy
FILTERED = "filtered_"  # how the reasons of samples begin that nobody wanted, as distinct from unusable ones
RECEIPT_SUFFIX = ".receipt.json"  # follows the latent shard's whole name: 00000.tar.receipt.json

Split = Literal["train", "holdout"]
Positive = Annotated[int, Field(gt=0, lt=2**53)]
Natural = Annotated[int, Field(ge=0, lt=2**53)]  # which JSON, floats and numpy all hold
Range = tuple[Natural, Natural]  # [first, end)
Bucket = tuple[Positive, Positive]  # height, width in pixels
Environment = dict[str, str | int]


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value alone. Raises ValueError on NaN and infinity."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


class Record(BaseModel):
    """A frozen model with canonical JSON bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def to_bytes(self) -> bytes:
        """Canonical JSON, the same for equal records."""
        return canonical(self.model_dump(mode="json"))


class Tower(Record):
    """What a caption was turned into by one text tower, or for it."""

    name: str
    tokenizer: str  # digest: codes, normalisation, context length, padding token
    context_length: int = Field(gt=0, le=65_536)
    weights: str = ""  # hash of all parameters; empty where only token ids are stored
    layer: str = ""  # "last" or "penultimate"
    final_norm: bool = True
    width: Natural = 0  # D of the stored embeddings
    pooled_width: Natural = 0  # of the stored pooled vector; 0 = none


class Fingerprint(Record):
    """Everything that changes the meaning of the latents' and captions' bytes, by name."""

    autoencoder_weights: str  # hash of all parameters
    autoencoder_config: str  # digest
    precision: str  # in which the autoencoder ran
    tiling: bool
    normalisation: str  # from bytes to the autoencoder's input
    resize_filter: str
    crop_rule: str
    resolution: Positive
    buckets: tuple[Bucket, ...] = Field(min_length=1)  # every size that a picture may be brought to
    max_upscale: FiniteFloat
    flip: bool
    background: tuple[int, int, int]
    filters: str  # canonical JSON
    text_mode: str
    text_padding: str
    text_precision: str
    text_towers: tuple[Tower, ...] = Field(min_length=1)
    caption_field: str
    dtype: str
    holdout: FiniteFloat

    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def difference(self, other: Fingerprint) -> list[str]:
        """Names of the fields that differ, in order of declaration; empty when both mean the same."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]

    @property
    def context_length(self) -> int:
        """Tokens of a caption, the longest tower's."""
        return max(tower.context_length for tower in self.text_towers)


class BucketRange(Record):
    """Where the samples of one picture size stand in a shard, in file order."""

    bucket: Bucket
    train: Range
    holdout: Range


class Block(Record):
    """A run of samples that can be read and checked alone; it never crosses a range's border."""

    first_sample: Natural
    samples: Natural
    offset: Natural  # bytes from the start of the tar
    length: Natural
    crc32: int


class Statistics(Record):
    """Float64 sums over the training samples, per latent channel, of the stored (float16) values."""

    count: Natural  # elements of each channel: samples * h * w
    sum: tuple[float, ...]  # [C] of the posterior means
    sum_squares: tuple[float, ...]  # [C] of their squares
    sum_variance: tuple[float, ...]  # [C] of exp(logvar)

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
    source_version: str = ""  # what the store knows the file's state by: ETag, or time of change
    fingerprint: str  # digest
    bytes: int
    sha256: str
    buckets: tuple[BucketRange, ...]  # none when every sample was rejected
    blocks: tuple[Block, ...]
    keys: str  # hash of each sample's key in file order, see `hashes`
    statistics: Statistics
    rejects: tuple[Reject, ...]
    environment: Environment

    @field_validator("keys")
    @classmethod
    def _keys_are_hashes(cls, keys: str) -> str:
        unpack_hashes(keys)
        return keys

    def samples(self) -> int:
        """Samples in the shard, of both splits."""
        return sum(bucket.holdout[1] - bucket.train[0] for bucket in self.buckets)

    def hashes(self) -> array[int]:
        """`key_hash` of every sample, in file order."""
        return unpack_hashes(self.keys)

    def ranges(self, split: Split) -> list[Range]:
        """The split's non-empty sample ranges, in file order: at most one for each bucket."""
        found = [bucket.train if split == "train" else bucket.holdout for bucket in self.buckets]
        return [(first, end) for first, end in found if end > first]


@cache
def _shared(bucket: Bucket) -> Bucket:
    """One and the same tuple for equal buckets: a manifest of many shards repeats a few of them over and over."""
    return bucket


@dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BucketCount:
    """How many samples of one picture size a shard has. There are many of these in a manifest, so they are small."""

    bucket: Annotated[Bucket, AfterValidator(_shared)]
    train: Natural
    holdout: Natural


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
    images: tuple[str, ...] = Field(min_length=1)  # where the image shards were
    shard_name_parts: Positive  # how many parts of their addresses name them
    autoencoder: str  # where the encoder was read from
    latent_channels: Positive
    downsampling_factor: Positive
    scaling_factor: FiniteFloat  # of the autoencoder's own config; latents are stored without it
    shift_factor: FiniteFloat
    shards: tuple[ShardEntry, ...]  # in the order of their sources
    mean: tuple[Annotated[FiniteFloat, Field(gt=-1e30, lt=1e30)], ...]  # [C] of z over the training samples
    std: tuple[Annotated[FiniteFloat, Field(gt=1e-30, lt=1e30)], ...]  # [C]; float32 has it, and its inverse
    rejects: dict[str, int]  # reason -> samples; reasons of unwanted ones begin with `FILTERED`
    attribution: str = ""  # whom the pictures are by, under which licence
    environments: tuple[Environment, ...]  # distinct versions and hardware of the workers

    @model_validator(mode="after")
    def _statistics_are_of_all_channels(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} numbers for {self.latent_channels} latent channels")
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON; shard by shard, as the whole tree would take several times the file's size."""
        whole = canonical(self.model_dump(mode="json", exclude={"shards"}) | {"shards": []})
        if not self.shards:
            return whole
        before, after = whole.split(b'\n "shards": []', 1)
        pieces = [before, b'\n "shards": [']
        for shard in self.shards:
            pieces += (b"\n  ", shard.to_bytes().rstrip().replace(b"\n", b"\n  "), b",")
        pieces[-1] = b"\n ]"
        return b"".join([*pieces, after])

    def samples(self, split: Split) -> int:
        """Samples of the split, over all shards."""
        return sum(shard.samples(split) for shard in self.shards)

    def buckets(self, split: Split = "train") -> dict[Bucket, int]:
        """Picture sizes that occur in the split, with their samples, in order of size."""
        found: Counter[Bucket] = Counter()
        for shard in self.shards:
            for bucket in shard.buckets:
                found[bucket.bucket] += bucket.train if split == "train" else bucket.holdout
        return {bucket: found[bucket] for bucket in sorted(found) if found[bucket]}

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """2C, h, w of a bucket's moments."""
        factor = self.downsampling_factor
        return 2 * self.latent_channels, bucket[0] // factor, bucket[1] // factor

    @property
    def context_length(self) -> int:
        """Tokens of a caption, the longest tower's."""
        return self.fingerprint.context_length

    @property
    def base_side(self) -> int:
        """h = w of the latents of square pictures at the resolution, whether there are other shapes or not."""
        return self.fingerprint.resolution // self.downsampling_factor

    @property
    def latent_side(self) -> int:
        """The same, of data that are all square. Raises DataError where there are buckets."""
        if self.fingerprint.buckets != ((self.fingerprint.resolution,) * 2,):
            raise DataError(
                "the latents are of several shapes, by aspect ratio, and this command takes squares only",
                "encode them without images.buckets",
            )
        return self.base_side


def key_hash(key: str) -> int:
    """64 bits by which a sample's key is known in receipts."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def pack_hashes(hashes: Iterable[int]) -> str:
    """64-bit numbers as text: big-endian, base64."""
    packed = array("Q", hashes)
    if sys.byteorder == "little":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")


def unpack_hashes(text: str) -> array[int]:
    """The inverse of `pack_hashes`. Raises ValueError where `text` is something else."""
    hashes = array("Q", base64.b64decode(text, validate=True))
    if sys.byteorder == "little":
        hashes.byteswap()
    return hashes


def load_manifest(url: str) -> Manifest:
    """Read a manifest by its full address.

    Raises:
        StorageError: it is not there.
        DataError: not JSON, of a newer format, or a field is missing.
    """
    return parse_manifest(read_file(url), url)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes; errors name it by `where`. Raises DataError as `load_manifest`."""
    return _parse(Manifest, data, where)


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
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where} has format version {version}, this Lathe reads version {FORMAT_VERSION}",
            "install a newer lathe-ldm" if version > FORMAT_VERSION else "encode to a new output",
        )
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"field {name}: " for name in [".".join(map(str, first["loc"]))] if name)
        said = "is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise DataError(f"{where} is not a usable {what}: {field}{said}", remedy) from error
