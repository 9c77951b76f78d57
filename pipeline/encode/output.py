"""What stands in one resolution's output: which shards are committed, and the manifest folded from their receipts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pipeline.config import EncodeConfig
from pipeline.console import tell
from pipeline.data.fold import Provenance, fold
from pipeline.data.manifest import (
    EMPTY_PREFIX,
    ENCODING,
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    REMOVED,
    Manifest,
    Receipt,
    load_receipt,
)
from pipeline.data.pack import attribution
from pipeline.data.samples import SHARD_DAMAGED
from pipeline.encode.claim import Encoding, Target
from pipeline.encode.overlap import mapped
from pipeline.encode.rejects import reject_lines
from pipeline.encode.sources import Source
from pipeline.encode.takedown.keys import read_takedown
from pipeline.encode.tally import Tally, check_rejects
from pipeline.errors import DataError, StorageError
from pipeline.storage import Store, open_store, open_stream, split, temporary_folder

_READERS = 16
_DIGESTERS = 4
_COMMITS = 3
_log = logging.getLogger(__name__)


def commit(target: Target, data: bytes | memoryview, receipt: Receipt) -> Receipt:
    """The shard, then its receipt: whoever sees the receipt may trust the shard.

    Where a twin has committed the shard meanwhile, its receipt is returned and nothing is written: on other hardware
    its latents may differ in their last places, and a shard must never stand beside the receipt of another.

    Raises:
        DataError: the output was claimed for other settings, or holds the latents of the source as it was when it was
            whole, and now it is damaged.
        StorageError: it cannot be written.
    """
    target.check_claim()
    store, name = target.store, receipt.shard + RECEIPT_SUFFIX
    _keep_whole(target, receipt)
    for _ in range(_COMMITS):
        if twin := _twin(target, receipt):
            return twin
        store.write(receipt.shard, data)
        written = _version(store, receipt.shard)
        store.write(name, receipt.to_bytes())
        if _version(store, receipt.shard) == written:
            return receipt
    raise DataError(
        f"{store.url}/{receipt.shard} keeps being written by another worker",
        "give each worker a share of its own (--task)",
    )


def committed(
    target: Target, sources: Iterable[Source], tally: Tally, digests: dict[str, str] | None = None
) -> set[str]:
    """Names of the latent shards that are complete and still their sources'; their receipts go into the tally.

    A source that was written anew is read through: where its bytes are the same, the receipt learns its new version.

    Args:
        target: the output of one resolution.
        sources: the image shards.
        tally: what is added to.
        digests: SHA-256 of sources that were read through, by address; those read now are added.
    """
    found: set[str] = set()
    stale: list[tuple[Source, Receipt]] = []
    for source, receipt in _receipts(target, sources):
        if receipt is None:
            continue
        if receipt.source_version != source.version:
            stale.append((source, receipt))
            continue
        found.add(source.shard)
        tally.add(receipt)
    digests = {} if digests is None else digests
    _read_through([source for source, _ in stale if source.url not in digests], digests)
    for source, receipt in stale:
        if digests[source.url] != receipt.source_sha256:
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
    """Fold the receipts of all sources; writes the rejects and the manifest, then sweeps up after the killed.

    Raises:
        DataError: shards are missing, too many samples were rejected, or none is left to train on.
        StorageError: the output cannot be read or written.
    """
    target.check_claim()
    fitting = _Fitting(replace(target, takedown=read_takedown(target.store)), sources)
    with temporary_folder("encode") as folder:
        rejects = folder / REJECTS
        with rejects.open("w", encoding="ascii") as lines:
            manifest = fitting.fold(_provenance(config, target, sources), lines.write)
        check_rejects(fitting.tally, config.max_reject_rate)
        target.store.upload(rejects, REJECTS)
    if len(manifest.environments) > 1:
        _log.warning(
            "the shards were encoded with different versions, hardware, threads or batch sizes: latents may differ"
            " in float16's last places (see environments in %s)",
            MANIFEST,
        )
    target.store.write(MANIFEST, manifest.to_bytes())
    _sweep(target.store, [source.shard for source in sources])
    return manifest


def _sweep(store: Store, shards: Sequence[str]) -> None:
    """Drop what killed workers left. A living one whose unfinished file is taken away starts it anew."""
    empty = [entry.name for entry in store.list(EMPTY_PREFIX)]
    try:
        store.sweep([*shards, *(name + RECEIPT_SUFFIX for name in shards)])
        store.sweep([ENCODING, REJECTS, MANIFEST, REMOVED, *empty])
    except StorageError as error:
        _log.warning("what killed workers may have left is still there: %s", error.message)


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

    def fold(self, about: Provenance, write_reject: Callable[[str], object]) -> Manifest:
        absent = missing(self._target, self._sources)  # without reading thousands of receipts, where it is plain
        if absent:
            raise IncompleteError(absent, len(self._sources))
        with closing(self._fitting(write_reject)) as receipts:
            return fold(receipts, about)

    def _fitting(self, write_reject: Callable[[str], object]) -> Generator[Receipt, None, None]:
        for source, receipt in _receipts(self._target, self._sources):
            if receipt is None or receipt.source_version != source.version:
                self._missing.append(source.shard)
                continue
            self.tally.add(receipt)
            for line in reject_lines(receipt):
                write_reject(line)
            yield receipt
        if self._missing:
            raise IncompleteError(self._missing, len(self._sources))


def _receipts(target: Target, sources: Iterable[Source]) -> Iterator[tuple[Source, Receipt | None]]:
    """Each source with the receipt of its latent shard, where that is complete and of this encoding."""
    sizes = {entry.name: entry.size for entry in target.store.list()}

    def look(source: Source) -> tuple[Source, Receipt | None]:
        name = source.shard + RECEIPT_SUFFIX
        if name not in sizes:
            return source, None
        receipt = load_receipt(target.store, name)
        same = (receipt.shard, receipt.source, receipt.source_bytes) == (source.shard, source.name, source.bytes)
        return source, receipt if same and _is_whole(target, receipt, sizes.get(receipt.shard)) else None

    with ThreadPoolExecutor(_READERS, "receipts") as pool:
        yield from mapped(pool, look, sources, ahead=4 * _READERS)


def _is_whole(target: Target, receipt: Receipt, size: int | None) -> bool:
    """Whether a receipt is of this encoding, and its shard, of `size` bytes, complete."""
    return receipt.fingerprint == target.digest and size == receipt.bytes and not target.takedown.touches(receipt)


def _twin(target: Target, receipt: Receipt) -> Receipt | None:
    """The receipt of the same shard that another worker has committed."""
    sizes = {entry.name: entry.size for entry in target.store.list(receipt.shard)}
    if receipt.shard + RECEIPT_SUFFIX not in sizes:
        return None
    twin = load_receipt(target.store, receipt.shard + RECEIPT_SUFFIX)
    same = all(
        getattr(twin, name) == getattr(receipt, name)
        for name in ("shard", "source", "source_bytes", "source_sha256", "source_version")
    )
    return twin if same and _is_whole(target, twin, sizes.get(receipt.shard)) else None


def _keep_whole(target: Target, receipt: Receipt) -> None:
    """A source that was damaged since must not cost the latents of what it held."""
    name = receipt.shard + RECEIPT_SUFFIX
    if not _is_damaged(receipt) or not target.store.exists(name):
        return
    before = load_receipt(target.store, name)
    if before.fingerprint == receipt.fingerprint and before.source == receipt.source and not _is_damaged(before):
        raise DataError(
            f"image shard {receipt.source} was whole when it was encoded, and is damaged now",
            f"restore it (its latents are kept); or delete {name}, and what is left of it is encoded",
        )


def _is_damaged(receipt: Receipt) -> bool:
    return any(reject.reason == SHARD_DAMAGED for reject in receipt.rejects)


def _version(store: Store, name: str) -> str:
    """What the store knows the file's present state by; empty where it is not there."""
    return next((entry.version for entry in store.list(name) if entry.name == name), "")


def _provenance(config: EncodeConfig, target: Target, sources: Sequence[Source]) -> Provenance:
    images = config.images.shards
    return Provenance(
        images=tuple(map(_from_anywhere, (images,) if isinstance(images, str) else images)),
        shard_name_parts=config.images.shard_name_parts,
        attribution=attribution(open_store(split(sources[0].url)[0])),
        **{name: getattr(target.encoding, name) for name in Encoding.model_fields},
    )


def _from_anywhere(pattern: str) -> str:
    """A pattern that means the same from other working folders."""
    return pattern if "://" in pattern or pattern.startswith("~") else str(Path.cwd() / pattern)


def _read_through(sources: Sequence[Source], digests: dict[str, str]) -> None:
    if not sources:
        return
    size = sum(source.bytes for source in sources)
    tell(f"{len(sources)} image shards were written anew: reading them through ({size / 2**20:,.0f} MiB)")
    with ThreadPoolExecutor(_DIGESTERS, "digest") as pool:
        urls = [source.url for source in sources]
        digests.update(zip(urls, mapped(pool, _sha256, urls, ahead=_DIGESTERS), strict=True))


def _sha256(url: str) -> str:
    with open_stream(url) as stream:
        while stream.read(1 << 20):
            pass
        return stream.sha256()
