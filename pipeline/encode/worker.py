"""One worker's image shards into latent shards: fetching, decoding, encoding and uploading run at once.

A thread reads the source shards as streams and feeds a pool of decoders; the calling thread gathers what they give into
batches of one resolution and bucket and hands them to the encoder; a second pool assembles and uploads finished shards.
Batches are formed within one source shard, so that its latents depend neither on the share nor on restarts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.config import EncodeConfig
from pipeline.cores import available_cores
from pipeline.data import images
from pipeline.data.buckets import nearest_bucket, scale
from pipeline.data.filters import UPSCALE, Filters
from pipeline.data.manifest import Bucket, Environment, Receipt
from pipeline.data.samples import ImageSample, Rejected, is_holdout, read_image_shard
from pipeline.encode.claim import Target
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity, Text
from pipeline.encode.meter import Meter
from pipeline.encode.output import commit
from pipeline.encode.overlap import Budget, ahead
from pipeline.encode.sources import Source
from pipeline.encode.takedown.keys import REASON as REMOVED
from pipeline.encode.tally import NON_FINITE_LATENT, NON_FINITE_TEXT, unwanted
from pipeline.errors import StorageError
from pipeline.storage import open_stream

UPLOADERS = 2
_UNDECODED_BYTES = 256 * 2**20  # of picture files that wait for a decoder


class PendingMoments(Protocol):
    """A batch that the device is at."""

    def result(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16] | None]:
        """Moments [N, 2C, h, w], and those of the mirrored pictures where they were asked for."""
        ...


class Encodes(Protocol):
    """The part of the encoder that a worker needs."""

    channels: int
    environment: Environment

    def start(self, pixels: images.Pixels, flip: bool) -> PendingMoments: ...  # noqa: D102
    def text(self, captions: Sequence[str]) -> list[Text]: ...  # noqa: D102


@dataclass(frozen=True)
class Work:
    """An image shard, and the targets (by number) that lack its latents."""

    source: Source
    targets: tuple[int, ...]


@dataclass(frozen=True)
class _Fitted:
    """A picture as one target takes it."""

    bucket: Bucket
    pixels: images.Pixels  # [bucket's height, bucket's width, 3]
    size: npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Decoding:
    key: str
    captions: tuple[str, ...]
    fitted: Future[dict[int, _Fitted | str]]  # by target: the picture, or why not


@dataclass(frozen=True)
class _Waiting:
    """A picture in a batch that is not full yet."""

    key: str
    captions: tuple[str, ...]
    fitted: _Fitted
    is_counted: bool  # in one of its targets, for the meter


_Item = _Decoding | Rejected | SourceIdentity


@dataclass
class _Open:
    """The latent shards of the source at hand, and their batches that are not full yet."""

    work: Work
    shards: dict[int, LatentShard]
    batches: dict[tuple[int, Bucket], list[_Waiting]] = field(default_factory=dict)


class Worker:
    """Args: the job, what encodes, where to, and what is measured."""

    def __init__(self, config: EncodeConfig, encoder: Encodes, targets: Sequence[Target], meter: Meter) -> None:
        self._config, self._encoder, self._targets, self._meter = config, encoder, targets, meter
        self._filters = Filters(config.images.filters)
        # Steps that wait for the device, in order: while one batch is encoded the next is prepared.
        self._line: deque[Callable[[], None]] = deque()
        self._uploads: deque[Future[tuple[int, Receipt]]] = deque()
        self._uploaders = ThreadPoolExecutor(UPLOADERS, "upload")
        self._undecoded = Budget(_UNDECODED_BYTES)

    def run(self, work: Sequence[Work]) -> Generator[tuple[int, Receipt], None, None]:
        """Target's number and receipt of each latent shard, once both are stored. For one call."""
        decoders = ThreadPoolExecutor(decoder_count(self._config), "decode")
        is_lost = False
        try:
            depth = max(2 * self._config.batch_size, 2 * decoder_count(self._config))
            with closing(ahead(self._read(work, decoders), depth)) as items:
                for one in work:
                    self._gather(one, items)
                    yield from self._uploaded(UPLOADERS * len(self._targets))
                self._advance(0)
            yield from self._uploaded(0)
        except StorageError:
            is_lost = True  # the other uploads would wait for the same store in vain
            raise
        finally:
            self._undecoded.close()
            decoders.shutdown(wait=False, cancel_futures=True)
            self._uploaders.shutdown(wait=True, cancel_futures=is_lost)

    def _read(self, work: Iterable[Work], decoders: Executor) -> Iterator[_Item]:
        """The samples of each shard as they are being decoded, and behind each shard's last the shard's identity."""
        for one in work:
            with open_stream(one.source.url) as stream:
                samples, counted = read_image_shard(stream, self._config.images.caption_field), 0
                while True:
                    with self._meter.busy("fetch"):
                        sample = next(samples, None)
                    self._meter.count(read=stream.bytes_read - counted, parsed=sample is not None)
                    counted = stream.bytes_read
                    if sample is None:
                        break
                    yield self._wanted(sample, one, decoders)
                with self._meter.busy("fetch"):
                    while stream.read(1 << 20):
                        pass
                self._meter.count(read=stream.bytes_read - counted)
                identity = SourceIdentity(one.source.name, stream.bytes_read, stream.sha256(), stream.version)
            yield identity

    def _wanted(self, sample: ImageSample | Rejected, work: Work, decoders: Executor) -> _Decoding | Rejected:
        if isinstance(sample, Rejected):
            return sample
        with self._meter.busy("fetch"):
            reason = self._filters.of_sample(sample)
        if reason:
            return Rejected(sample.key, reason)
        # The file's bytes go no further than the decoder: what waits for its batch is pixels alone.
        self._undecoded.take(len(sample.image_bytes))
        fitted = decoders.submit(self._fit, sample.image_bytes, work.targets)
        return _Decoding(sample.key, self._filters.captions(sample), fitted)

    def _fit(self, data: bytes, targets: Iterable[int]) -> dict[int, _Fitted | str]:
        """Decode once, bring to each target's size."""
        try:
            with self._meter.busy("decode"):
                return self._decoded(data, targets)
        finally:
            self._undecoded.give(len(data))

    def _decoded(self, data: bytes, targets: Iterable[int]) -> dict[int, _Fitted | str]:
        try:
            pixels = images.decode(data, self._config.images.background)
        except images.ImageError as error:
            return dict.fromkeys(targets, error.reason)
        height, width = pixels.shape[:2]
        if reason := self._filters.of_size(height, width):
            return dict.fromkeys(targets, reason)
        fitted: dict[int, _Fitted | str] = {}
        for target in targets:
            bucket = nearest_bucket(height, width, self._targets[target].buckets)
            if scale(height, width, bucket) > self._config.images.max_upscale:
                fitted[target] = UPSCALE
            else:
                size = images.size_record(height, width, bucket)
                fitted[target] = _Fitted(bucket, images.cover(pixels, bucket), size)
        return fitted

    def _gather(self, work: Work, items: Iterator[_Item]) -> None:
        """One source shard's items into batches; at its end the latent shards are on their way."""
        config, channels = self._config, self._encoder.channels
        shard = _Open(work, {t: LatentShard(work.source.name, channels, config.block_samples) for t in work.targets})
        for item in items:
            if isinstance(item, SourceIdentity):
                for number, bucket in sorted(shard.batches):
                    self._encode(shard, number, bucket)
                self._line.append(partial(self._finish, shard, item))
                self._advance(2)  # where no sample of it was usable, no batch of the next may come soon
                return
            if isinstance(item, Rejected):
                self._reject(shard, dict.fromkeys(work.targets, item.reason), item.key)
            else:
                self._sort(shard, item)
        raise AssertionError("every shard's items end with its identity")

    def _sort(self, shard: _Open, item: _Decoding) -> None:
        """A decoded picture into the batch of each target that takes it."""
        fitted = item.fitted.result()
        taken = {number: found for number, found in fitted.items() if isinstance(found, _Fitted)}
        refused = {number: reason for number, reason in fitted.items() if isinstance(reason, str)}
        self._reject(shard, refused, item.key, count=not taken)
        for number, found in taken.items():
            batch = shard.batches.setdefault((number, found.bucket), [])
            batch.append(_Waiting(item.key, item.captions, found, is_counted=number == max(taken)))
            if len(batch) == self._config.batch_size:
                self._encode(shard, number, found.bucket)

    def _encode(self, shard: _Open, number: int, bucket: Bucket) -> None:
        """Start a batch, and take in the one before it, which the device has finished or soon will have."""
        batch = shard.batches.pop((number, bucket))
        pixels = np.stack([waiting.fitted.pixels for waiting in batch])
        with self._meter.busy("encode"):
            pending = self._encoder.start(pixels, self._config.images.flip)
            texts = iter(self._encoder.text([caption for waiting in batch for caption in waiting.captions]))

        def take() -> None:
            with self._meter.busy("encode"):
                moments, flipped = pending.result()
            for i, waiting in enumerate(batch):
                mirrored = None if flipped is None else flipped[i]
                text = tuple(next(texts) for _ in waiting.captions)
                self._add(shard, number, waiting, (moments[i], mirrored, text))

        self._line.append(take)
        self._advance(1)

    def _add(
        self,
        shard: _Open,
        number: int,
        waiting: _Waiting,
        encoded: tuple[npt.NDArray[np.float16], npt.NDArray[np.float16] | None, tuple[Text, ...]],
    ) -> None:
        """One sample into its latent shard, unless it is not finite or was taken down."""
        moments, mirrored, text = encoded
        reason = _not_finite(moments, mirrored, text)
        if reason is None and self._targets[number].takedown.holds(shard.work.source.name, waiting.key):
            reason = REMOVED
        if reason:
            self._reject(shard, {number: reason}, waiting.key, count=waiting.is_counted)
            return
        fitted = waiting.fitted
        sample = EncodedSample(waiting.key, waiting.captions, fitted.bucket, moments, mirrored, text, fitted.size)
        shard.shards[number].add(sample, holdout=is_holdout(waiting.key, self._config.images.holdout))
        self._meter.count(images=waiting.is_counted)

    def _advance(self, keep: int) -> None:
        """Take the steps in line, but for the newest `keep`."""
        while len(self._line) > keep:
            self._line.popleft()()

    def _reject(self, shard: _Open, reasons: Mapping[int, str], key: str, *, count: bool = True) -> None:
        """Leave a sample out of some targets; the meter counts it where no target takes it."""
        for number, reason in reasons.items():
            shard.shards[number].reject(key, reason)
        if count:
            reason = next(iter(reasons.values()))
            one = {reason: 1}
            self._meter.count(filtered=one if unwanted(reason) else None, rejected=None if unwanted(reason) else one)

    def _finish(self, shard: _Open, identity: SourceIdentity) -> None:
        left = set(shard.work.targets)

        def upload(number: int) -> tuple[int, Receipt]:
            target = self._targets[number]
            data, receipt = shard.shards.pop(number).finish(
                shard.work.source.shard, identity, target.digest, self._encoder.environment
            )
            with self._meter.busy("upload"):
                receipt = commit(target, data, receipt)
            left.discard(number)
            self._meter.count(written=receipt.bytes, shards=not left)
            return number, receipt

        self._uploads.extend(self._uploaders.submit(upload, number) for number in shard.work.targets)

    def _uploaded(self, keep: int) -> Iterator[tuple[int, Receipt]]:
        """What is stored; waits until no more than `keep` uploads are under way, which bounds the memory."""
        while self._uploads and (len(self._uploads) > keep or self._uploads[0].done()):
            yield self._uploads.popleft().result()


def _not_finite(
    moments: npt.NDArray[np.float16], mirrored: npt.NDArray[np.float16] | None, text: Iterable[Text]
) -> str | None:
    """Why a sample may not reach a shard: float32 was tried before."""
    if not np.isfinite(moments).all() or (mirrored is not None and not np.isfinite(mirrored).all()):
        return NON_FINITE_LATENT
    if not all(np.isfinite(values).all() for caption in text for values in caption.values()):
        return NON_FINITE_TEXT
    return None


def decoder_count(config: EncodeConfig) -> int:
    """Decoding threads: as the run file says, or this process's part of the cores that it may use."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return config.decode_threads or max(1, available_cores() // (int(here) if here.isdecimal() and int(here) else 1))
