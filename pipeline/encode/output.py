"""What stands in the output: its fingerprint, the shards that are committed, and the manifest folded from them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.config import EncodeConfig
from pipeline.data.manifest import (
    EMPTY_TOKENS,
    MANIFEST,
    RECEIPT_SUFFIX,
    REJECTS,
    Fingerprint,
    Manifest,
    Receipt,
    fold,
    load_receipt,
)
from pipeline.data.pack import attribution
from pipeline.data.tar import npy_bytes
from pipeline.encode.encoder import Encoder
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Store, find_shards, local_path, open_store, split

FINGERPRINT = "fingerprint.json"
MIN_SEEN = 100  # samples before a shard's end says something about the reject rate
_READERS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An image shard, and the name of the latent shard that it becomes."""

    url: str
    bytes: int
    shard: str

    @property
    def name(self) -> str:
        """The image shard's own name."""
        return split(self.url)[1]


def find_sources(config: EncodeConfig) -> list[Source]:
    """The image shards, in order of address.

    Raises:
        DataError: none, or two of one name.
        ConfigError: they stand in the output folder.
    """
    sources: list[Source] = []
    sizes: dict[str, dict[str, int]] = {}
    for url in find_shards(config.images.shards):
        parent, name = split(url)
        if _place(parent) == _place(config.output):
            raise ConfigError(f"output: {config.output} is where the image shards are", "choose another output")
        if parent not in sizes:
            sizes[parent] = {entry.name: entry.size for entry in open_store(parent).list()}
        sources.append(Source(url, sizes[parent][name], name if name.endswith(".tar") else f"{name}.tar"))
    repeated = [name for name, count in Counter(source.shard for source in sources).items() if count > 1]
    if repeated:
        raise DataError(f"several image shards are named {repeated[0]}", "rename them, or encode to different outputs")
    return sources


def claim_output(store: Store, fingerprint: Fingerprint) -> None:
    """Note the fingerprint in the output, or check that it is the one of the shards there.

    Raises:
        DataError: the output holds latents of another meaning; the message names the fields that differ.
    """
    if store.write(FINGERPRINT, fingerprint.to_bytes(), if_absent=True):
        return
    try:
        noted = Fingerprint.model_validate(json.loads(store.read(FINGERPRINT)))
    except ValueError as error:
        raise DataError(f"{store.url}: {FINGERPRINT} cannot be read", "choose another output") from error
    fields = noted.difference(fingerprint)
    if fields and not any(entry.name.endswith(RECEIPT_SUFFIX) for entry in store.list()):
        store.write(FINGERPRINT, fingerprint.to_bytes())
    elif fields:
        raise DataError(
            f"{store.url} holds latents that were made otherwise; these differ: {', '.join(fields)}",
            "choose another output, or use the settings and the autoencoder that it was begun with",
        )


def committed(store: Store, sources: Iterable[Source], fingerprint: Fingerprint) -> dict[str, Receipt]:
    """Receipts of the sources whose latent shards are complete and still theirs, by name of the latent shard."""
    sizes = {entry.name: entry.size for entry in store.list()}
    by_shard = {source.shard: source for source in sources if source.shard + RECEIPT_SUFFIX in sizes}
    with ThreadPoolExecutor(_READERS) as pool:
        receipts = pool.map(lambda shard: load_receipt(store, shard + RECEIPT_SUFFIX), by_shard)
    return {
        receipt.shard: receipt
        for source, receipt in zip(by_shard.values(), receipts, strict=True)
        if (receipt.shard, receipt.source, receipt.source_bytes) == (source.shard, source.name, source.bytes)
        and receipt.fingerprint == fingerprint.digest()
        and sizes.get(receipt.shard) == receipt.bytes
    }


def missing_shards(store: Store, sources: Sequence[Source], fingerprint: Fingerprint) -> list[str]:
    """Names of the latent shards that are not committed. Receipts are read only when all of them are there."""
    there = {entry.name for entry in store.list()}
    if missing := [source.shard for source in sources if source.shard + RECEIPT_SUFFIX not in there]:
        return missing
    valid = committed(store, sources, fingerprint)
    return [source.shard for source in sources if source.shard not in valid]


def samples_seen(receipt: Receipt) -> int:
    """Samples of the source shard, used or rejected."""
    return sum(bucket.holdout[1] - bucket.train[0] for bucket in receipt.buckets) + len(receipt.rejects)


def check_rejects(receipts: Iterable[Receipt], limit: float, min_seen: int = 0) -> None:
    """Whether few enough samples were rejected.

    Raises:
        DataError: the share is above `limit`, of at least `min_seen` samples; the message has the commonest reasons.
    """
    reasons: Counter[str] = Counter()
    seen = 0
    for receipt in receipts:
        seen += samples_seen(receipt)
        reasons.update(reject.reason for reject in receipt.rejects)
    if seen >= min_seen and reasons.total() > limit * seen:
        said = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise DataError(
            f"{reasons.total()} of {seen} pictures were rejected ({said}), more than max_reject_rate={limit}",
            "look at the rejects in the receipts; mend the shards, or raise max_reject_rate: finished shards are kept",
        )


def fold_output(config: EncodeConfig, encoder: Encoder, store: Store, sources: Sequence[Source]) -> Manifest:
    """Fold the receipts of all sources; writes the empty prompt's tokens, the rejects and, last, the manifest.

    Raises:
        DataError: shards are missing, too many samples were rejected, or none is left to train on.
    """
    receipts = committed(store, sources, encoder.fingerprint)
    if missing := [source.shard for source in sources if source.shard not in receipts]:
        raise DataError(
            f"{len(missing)} of {len(sources)} latent shards are missing: {', '.join(missing[:3])}",
            "run lathe encode for them (the same command goes on where it was)",
        )
    ordered = [receipts[source.shard] for source in sources]
    check_rejects(ordered, config.max_reject_rate)
    manifest = fold(
        ordered,
        encoder.fingerprint,
        autoencoder=config.autoencoder,
        latent_channels=encoder.channels,
        downsampling_factor=encoder.downsampling_factor,
        attribution=attribution(open_store(split(sources[0].url)[0])),
    )
    if len(manifest.environments) > 1:
        _log.warning(
            "the shards were encoded with different versions, hardware, threads or batch sizes: latents may differ in"
            " float16's last places (see environments in %s)",
            MANIFEST,
        )
    store.write(EMPTY_TOKENS, npy_bytes(encoder.tokenizer.empty))
    store.write(REJECTS, _reject_lines(ordered))
    store.write(MANIFEST, manifest.to_bytes())
    return manifest


def _reject_lines(receipts: Iterable[Receipt]) -> bytes:
    lines = [
        json.dumps({"shard": receipt.source, "key": reject.key, "reason": reject.reason})
        for receipt in receipts
        for reject in receipt.rejects
    ]
    return "".join(line + "\n" for line in lines).encode("ascii")


def _place(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(local_path(url).resolve())
