"""`lathe encode`: image shards to latent shards and a manifest, by any number of workers that never talk to each other.

A worker takes every N-th source shard. For each it writes one latent shard and then its receipt: a shard counts once
its receipt is there, so a worker that was killed loses at most the shards it had in hand. Whoever finds all receipts in
place folds them into the manifest. Fetching, parsing, decoding and uploading run beside the autoencoder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.manifest import RECEIPT_SUFFIX, Manifest, Receipt
from pipeline.data.samples import SHARD_DAMAGED, ImageSample, Rejected, is_holdout, read_image_shard
from pipeline.encode.encoder import Encoder
from pipeline.encode.output import (
    MIN_SEEN,
    Source,
    check_rejects,
    claim_output,
    committed,
    find_sources,
    fold_output,
    missing_shards,
    samples_seen,
)
from pipeline.encode.overlap import ahead
from pipeline.encode.receipt import EncodedSample, LatentShard, SourceIdentity
from pipeline.errors import ConfigError
from pipeline.storage import Store, open_store, split

_log = logging.getLogger(__name__)

Progress = Callable[[int, int, int], None]  # source shards done, source shards of this worker, samples rejected
Decoded = tuple[images.Pixels, npt.NDArray[np.int32]]  # square pixels, size record


@dataclass(frozen=True)
class EncodeSummary:
    """What one worker did, with the shards that earlier runs had finished."""

    shards: int
    encoded: int  # of these, in this run
    samples: int
    rejects: int
    waiting: int  # shards of other workers that are not there yet
    manifest: Manifest | None  # folded by this worker, when nothing is waiting

    def __str__(self) -> str:
        done = f"{self.samples} pictures in {self.shards} shards ({self.encoded} encoded now), {self.rejects} rejected"
        last = "manifest written" if self.manifest else f"{self.waiting} shards of other workers are still to come"
        return f"{done}; {last}"


def encode(
    config: EncodeConfig, task: tuple[int, int] = (0, 1), progress: Progress = lambda done, total, rejects: None
) -> EncodeSummary:
    """Encode this worker's share, and fold the manifest if it is the last to finish.

    Shards that are committed with the same fingerprint and from the same source are left as they are. The finished
    data set has the same bytes for any number of workers and restarts, on equal hardware, threads and versions.

    Args:
        config: the job, the same for all workers.
        task: (index, count): takes every count-th source shard from the index-th on, counted from 0.
        progress: called after each shard with (shards done, this worker's shards, samples rejected).

    Raises:
        ConfigError: a task or resolution that cannot be.
        DataError: no shards, too many rejects, or an output of another fingerprint; it names the fields.
        StorageError: a source, the autoencoder or the output cannot be reached.
    """
    index, count = task
    if not 0 <= index < count:
        raise ConfigError(f"task {index}/{count}: not a share", "use I/N with I from 0 to N-1")
    sources = find_sources(config)
    encoder = Encoder(config)
    store = open_store(config.output)
    claim_output(store, encoder.fingerprint)
    mine = sources[index::count]
    receipts = committed(store, mine, encoder.fingerprint)
    pending = [source for source in mine if source.shard not in receipts]

    def report() -> None:
        progress(len(receipts), len(mine), sum(len(receipt.rejects) for receipt in receipts.values()))

    report()
    with closing(_encode_shards(config, encoder, store, pending)) as finished:
        for receipt in finished:
            receipts[receipt.shard] = receipt
            report()
            if any(reject.reason == SHARD_DAMAGED for reject in receipt.rejects):
                readable = samples_seen(receipt) - len(receipt.rejects)
                _log.warning("%s is damaged: %d pictures of it could be read", receipt.source, readable)
            check_rejects(receipts.values(), config.max_reject_rate, MIN_SEEN)
    check_rejects(receipts.values(), config.max_reject_rate)
    missing = missing_shards(store, sources, encoder.fingerprint)
    rejects = sum(len(receipt.rejects) for receipt in receipts.values())
    return EncodeSummary(
        shards=len(receipts),
        encoded=len(pending),
        samples=sum(map(samples_seen, receipts.values())) - rejects,
        rejects=rejects,
        waiting=len(missing),
        manifest=None if missing else fold_output(config, encoder, store, sources),
    )


def finalize(config: EncodeConfig) -> Manifest:
    """Fold the manifest from the receipts that the workers left. The last worker does this by itself.

    Raises:
        DataError: shards are missing (named), or as `encode`.
    """
    sources = find_sources(config)
    encoder = Encoder(config)
    store = open_store(config.output)
    claim_output(store, encoder.fingerprint)
    return fold_output(config, encoder, store, sources)


@dataclass(frozen=True)
class _Fetched:
    source: Source
    data: bytes


@dataclass(frozen=True)
class _Decoding:
    sample: ImageSample
    result: Future[Decoded]


def _encode_shards(
    config: EncodeConfig, encoder: Encoder, store: Store, sources: Sequence[Source]
) -> Generator[Receipt, None, None]:
    """Receipts of the sources, each once it is stored.

    Four stages run at once: one thread fetches the next shard, one parses and feeds the decoders, this one encodes,
    one uploads. At most three source shards and two latent shards are in memory.
    """
    decoders = ThreadPoolExecutor(config.threads or os.cpu_count() or 1, thread_name_prefix="decode")
    uploader = ThreadPoolExecutor(1, thread_name_prefix="upload")
    uploading: Future[Receipt] | None = None
    try:
        fetched = ahead(map(_fetch, sources), depth=1)
        with closing(ahead(_decode(fetched, decoders, config), depth=2 * config.batch_size)) as items:
            for source in sources:
                shard = _encode_shard(config, encoder, source, items)
                if uploading is not None:
                    yield uploading.result()
                uploading = uploader.submit(_commit, store, *shard)
        if uploading is not None:
            yield uploading.result()
    finally:
        decoders.shutdown(wait=False, cancel_futures=True)
        uploader.shutdown(wait=True)


def _fetch(source: Source) -> _Fetched:
    parent, name = split(source.url)
    return _Fetched(source, open_store(parent).read(name))


def _decode(
    shards: Iterator[_Fetched], decoders: ThreadPoolExecutor, config: EncodeConfig
) -> Iterator[_Decoding | Rejected | SourceIdentity]:
    """The samples of each shard as they are being decoded, and behind each shard's last the shard's identity."""
    for shard in shards:
        for sample in read_image_shard(shard.data, config.images.caption_field):
            if isinstance(sample, Rejected):
                yield sample
            else:
                yield _Decoding(sample, decoders.submit(_square, sample.image_bytes, config))
        yield SourceIdentity(shard.source.name, len(shard.data), hashlib.sha256(shard.data).hexdigest())


def _square(data: bytes, config: EncodeConfig) -> Decoded:
    pixels = images.decode(data, config.images.background)
    side = config.images.resolution
    return images.square(pixels, side), images.size_record(pixels.shape[0], pixels.shape[1], side)


def _encode_shard(
    config: EncodeConfig,
    encoder: Encoder,
    source: Source,
    items: Iterator[_Decoding | Rejected | SourceIdentity],
) -> tuple[bytes, Receipt]:
    """One shard's items into its latent shard; no batch reaches over its end, so any share gives these bytes."""
    side = config.images.resolution
    shard = LatentShard(source.name, (side, side), encoder.channels, config.block_samples)
    batch: list[tuple[ImageSample, Decoded]] = []
    for item in items:
        if isinstance(item, Rejected):
            shard.reject(item.key, item.reason)
        elif isinstance(item, _Decoding):
            try:
                batch.append((item.sample, item.result.result()))
            except images.ImageError as error:
                shard.reject(item.sample.key, error.reason)
        if batch and (isinstance(item, SourceIdentity) or len(batch) == config.batch_size):
            _encode_batch(config, encoder, batch, shard)
            batch = []
        if isinstance(item, SourceIdentity):
            return shard.finish(source.shard, item, encoder.fingerprint.digest(), encoder.environment)
    raise AssertionError("every shard's items end with its identity")


def _encode_batch(
    config: EncodeConfig, encoder: Encoder, batch: Sequence[tuple[ImageSample, Decoded]], shard: LatentShard
) -> None:
    moments = encoder.moments(np.stack([pixels for _, (pixels, _) in batch]))
    for (sample, (_, size)), latent in zip(batch, moments, strict=True):
        if not np.isfinite(latent).all():
            shard.reject(sample.key, "non_finite_latent")
            continue
        encoded = EncodedSample(sample.key, sample.captions, latent, encoder.tokenizer(sample.captions), size)
        shard.add(encoded, holdout=is_holdout(sample.key, config.images.holdout))


def _commit(store: Store, data: bytes, receipt: Receipt) -> Receipt:
    """The shard, then its receipt: whoever sees the receipt may trust the shard."""
    store.write(receipt.shard, data)
    store.write(receipt.shard + RECEIPT_SUFFIX, receipt.to_bytes())
    return receipt
