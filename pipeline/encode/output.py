"""What stands in one resolution's output: what it was claimed for, which shards are committed, the manifest."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipeline.config import EncodeConfig
from pipeline.data.fold import Provenance, fold
from pipeline.data.manifest import (
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    Bucket,
    Fingerprint,
    Manifest,
    Receipt,
    Record,
    load_receipt,
)
from pipeline.data.pack import attribution
from pipeline.data.tar import npy_bytes
from pipeline.encode.overlap import mapped
from pipeline.encode.rejects import reject_lines
from pipeline.encode.sources import Source
from pipeline.encode.takedown.keys import Takedown, read_takedown
from pipeline.encode.tally import Tally, check_rejects
from pipeline.errors import DataError
from pipeline.storage import Store, open_store, open_stream, split, temporary_folder

ENCODING = "encoding.json"
_READERS = 16
_STALE_SECONDS = 3600.0  # a manifest half-written for so long has no living writer
_log = logging.getLogger(__name__)


class Encoding(Record):
    """What an output was claimed for. Fields as in Manifest."""

    fingerprint: Fingerprint
    autoencoder: str
    latent_channels: int
    downsampling_factor: int
    scaling_factor: float
    shift_factor: float


class Describes(Protocol):
    """The part of the encoder that an output is claimed with."""

    channels: int
    downsampling_factor: int
    scaling_factor: float
    shift_factor: float

    def fingerprint(self, resolution: int) -> Fingerprint: ...  # noqa: D102
    def empty(self) -> Mapping[str, npt.NDArray[Any]]: ...  # noqa: D102


@dataclass(frozen=True)
class Target:
    """The output of one resolution."""

    store: Store
    encoding: Encoding
    takedown: Takedown

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The picture sizes of this resolution."""
        return self.encoding.fingerprint.buckets

    @cached_property
    def digest(self) -> str:
        """The fingerprint's digest, as receipts have it."""
        return self.encoding.fingerprint.digest()


def stores(config: EncodeConfig) -> dict[int, Store]:
    """The store of each resolution: the output itself, or a sub-folder for each where several are listed."""
    if isinstance(config.images.resolution, int):
        return {config.images.resolution: open_store(config.output)}
    return {side: open_store(f"{config.output.rstrip('/')}/{side}") for side in config.images.resolutions}


def claim(config: EncodeConfig, encoder: Describes) -> list[Target]:
    """Note in each resolution's output what it is for, or check that it is for the same.

    Raises:
        DataError: an output holds latents of another meaning; the message names the fields that differ.
    """
    targets = []
    for resolution, store in stores(config).items():
        encoding = Encoding(
            fingerprint=encoder.fingerprint(resolution),
            autoencoder=config.autoencoder,
            latent_channels=encoder.channels,
            downsampling_factor=encoder.downsampling_factor,
            scaling_factor=encoder.scaling_factor,
            shift_factor=encoder.shift_factor,
        )
        _claim(store, encoding, encoder.empty())
        targets.append(Target(store, encoding, read_takedown(store)))
    return targets


def claimed(config: EncodeConfig) -> list[Target]:
    """The outputs as workers have claimed them. Raises DataError where none has."""
    return [Target(store, _read(store), read_takedown(store)) for store in stores(config).values()]


def committed(target: Target, sources: Iterable[Source], tally: Tally) -> set[str]:
    """Names of the latent shards that are complete and still their sources'; their receipts go into the tally.

    A source that was written anew is read through: where its bytes are the same, the receipt learns its new version.
    """
    found: set[str] = set()
    for source, receipt in _receipts(target, sources):
        if receipt is None:
            continue
        if receipt.source_version != source.version:
            if _sha256(source.url) != receipt.source_sha256:
                _log.warning("%s has changed since it was encoded: encoding it again", source.url)
                continue
            receipt = receipt.model_copy(update={"source_version": source.version})
            target.store.write(receipt.shard + RECEIPT_SUFFIX, receipt.to_bytes())
        found.add(source.shard)
        tally.add(receipt)
    return found


def missing(target: Target, sources: Iterable[Source]) -> list[str]:
    """Names of the latent shards without a receipt."""
    there = {entry.name for entry in target.store.list() if entry.name.endswith(RECEIPT_SUFFIX)}
    return [source.shard for source in sources if source.shard + RECEIPT_SUFFIX not in there]


def fold_output(config: EncodeConfig, target: Target, sources: Sequence[Source]) -> Manifest:
    """Fold the receipts of all sources; writes the rejects and, last, the manifest, and sweeps up after the killed.

    Raises:
        DataError: shards are missing, too many samples were rejected, or none is left to train on.
    """
    fitting = _Fitting(target, sources)
    with temporary_folder("encode") as folder:
        rejects = folder / REJECTS
        with rejects.open("w", encoding="ascii") as lines:
            manifest = fitting.fold(_provenance(config, target, sources), lines.write)
        check_rejects(fitting.tally, config.max_reject_rate)
        target.store.upload(rejects, REJECTS)
    fitting.warn(manifest)
    names = [source.shard for source in sources]
    target.store.sweep([*names, *(name + RECEIPT_SUFFIX for name in names)])
    target.store.sweep([ENCODING, REJECTS, MANIFEST], older_than_seconds=_STALE_SECONDS)
    target.store.write(MANIFEST, manifest.to_bytes())
    return manifest


class IncompleteError(DataError):
    """Latent shards are missing, so there is no manifest yet."""

    def __init__(self, names: Sequence[str], of: int) -> None:
        super().__init__(
            f"{len(names)} of {of} latent shards are missing: {', '.join(names[:3])}",
            "run lathe encode for them (the same command goes on where it was)",
        )
        self.shards = len(names)


class _Fitting:
    """The receipts of all sources on their way into the manifest, with what is noticed on the way."""

    def __init__(self, target: Target, sources: Sequence[Source]) -> None:
        self._target, self._sources = target, sources
        self.tally = Tally()
        self._missing: list[str] = []
        self._hashes = array("Q")

    def fold(self, about: Provenance, write_reject: Callable[[str], object]) -> Manifest:
        absent = missing(self._target, self._sources)  # without reading thousands of receipts, where it is plain
        if absent:
            raise IncompleteError(absent, len(self._sources))
        with closing(self._fitting(write_reject)) as receipts:
            return fold(receipts, about)

    def warn(self, manifest: Manifest) -> None:
        if len(manifest.environments) > 1:
            _log.warning(
                "the shards were encoded with different versions, hardware, threads or batch sizes: latents may differ"
                " in float16's last places (see environments in %s)",
                MANIFEST,
            )
        repeated = len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64)))
        if repeated:
            _log.warning("%d keys occur more than once in the data set; `lathe verify` names them", repeated)

    def _fitting(self, write_reject: Callable[[str], object]) -> Generator[Receipt, None, None]:
        for source, receipt in _receipts(self._target, self._sources):
            if receipt is None or receipt.source_version != source.version:
                self._missing.append(source.shard)
                continue
            self.tally.add(receipt)
            self._hashes.extend(receipt.hashes())
            for line in reject_lines(receipt):
                write_reject(line)
            yield receipt
        if self._missing:
            raise IncompleteError(self._missing, len(self._sources))


def _claim(store: Store, encoding: Encoding, empty: Mapping[str, npt.NDArray[Any]]) -> None:
    if not store.exists(ENCODING) and store.write(ENCODING, encoding.to_bytes(), if_absent=True):
        fields = []
    else:
        noted = _read(store)
        fields = noted.fingerprint.difference(encoding.fingerprint)
        if fields and any(entry.name.endswith(RECEIPT_SUFFIX) for entry in store.list()):
            said = ", ".join(_told(noted.fingerprint, encoding.fingerprint, name) for name in fields)
            raise DataError(
                f"{store.url} holds latents that were made otherwise; these differ: {said}",
                "choose another output, or use the settings and the autoencoder that it was begun with",
            )
        if fields:
            store.write(ENCODING, encoding.to_bytes())
    for stem, array_ in empty.items():
        store.write(f"empty.{stem}.npy", npy_bytes(array_), if_absent=not fields)


def _read(store: Store) -> Encoding:
    if not store.exists(ENCODING):
        raise DataError(f"{store.url} has no {ENCODING}: nothing was encoded here", "run lathe encode first")
    try:
        return Encoding.model_validate_json(store.read(ENCODING))
    except ValidationError as error:
        raise DataError(f"{store.url}: {ENCODING} cannot be read", "choose another output") from error


def _told(before: Fingerprint, now: Fingerprint, name: str) -> str:
    """A field with its two values, where they are short enough for a person."""
    values = [str(getattr(fingerprint, name)) for fingerprint in (before, now)]
    return name if max(map(len, values)) > 40 else f"{name} ({values[0]}, now {values[1]})"


def _receipts(target: Target, sources: Iterable[Source]) -> Iterator[tuple[Source, Receipt | None]]:
    """Each source with the receipt of its latent shard, where that is complete and of this encoding."""
    sizes = {entry.name: entry.size for entry in target.store.list()}

    def look(source: Source) -> tuple[Source, Receipt | None]:
        name = source.shard + RECEIPT_SUFFIX
        if name not in sizes:
            return source, None
        receipt = load_receipt(target.store, name)
        fits = (
            (receipt.shard, receipt.source, receipt.source_bytes) == (source.shard, source.name, source.bytes)
            and receipt.fingerprint == target.digest
            and sizes.get(receipt.shard) == receipt.bytes
            and not target.takedown.touches(receipt)
        )
        return source, receipt if fits else None

    with ThreadPoolExecutor(_READERS, "receipts") as pool:
        yield from mapped(pool, look, sources, ahead=4 * _READERS)


def _provenance(config: EncodeConfig, target: Target, sources: Sequence[Source]) -> Provenance:
    images = config.images.shards
    return Provenance(
        images=(images,) if isinstance(images, str) else images,
        shard_name_parts=config.images.shard_name_parts,
        attribution=attribution(open_store(split(sources[0].url)[0])),
        **{name: getattr(target.encoding, name) for name in Encoding.model_fields},
    )


def _sha256(url: str) -> str:
    with open_stream(url) as stream:
        while stream.read(1 << 20):
            pass
        return stream.sha256()
