"""`lathe encode`: image shards to latent shards and a manifest, by any number of workers that never talk to each other.

A worker takes every N-th source shard. For each it writes one latent shard per resolution and then its receipt: a shard
counts once its receipt is there, so a worker that was killed loses at most the shards it had in hand. Whoever finds all
receipts in place folds them into the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import EncodeConfig
from pipeline.console import table, tell
from pipeline.data.filters import Filters
from pipeline.data.manifest import Manifest, Receipt
from pipeline.data.samples import SHARD_DAMAGED
from pipeline.encode.claim import Describes, Target, claim, claimed
from pipeline.encode.encoder import Encoder
from pipeline.encode.meter import Meter, Snapshot
from pipeline.encode.output import IncompleteError, committed, fold_output, missing
from pipeline.encode.reporter import Reporter
from pipeline.encode.sources import Source, find_sources
from pipeline.encode.tally import Tally, check_rejects_so_far
from pipeline.encode.worker import UPLOADERS, Encodes, Work, Worker, decoder_count
from pipeline.errors import ConfigError, DataError
from pipeline.metrics import Metrics, Place
from pipeline.storage import counters

Progress = Callable[[Snapshot], None]
_log = logging.getLogger(__name__)


class EncodesAndDescribes(Encodes, Describes, Protocol):
    """What a job needs of an encoder; `Encoder` is one."""


@dataclass(frozen=True)
class EncodeSummary:
    """What one worker did, with the shards that earlier runs had finished."""

    resolutions: tuple[int, ...]
    shards: int  # source shards of this worker
    encoded: int  # of these, in this run
    tallies: tuple[Tally, ...]  # of this worker's shards, by resolution
    waiting: int  # shards of other workers that are not there yet
    manifests: tuple[Manifest, ...]  # folded by this worker, when nothing is waiting

    def __str__(self) -> str:
        said = f"{self.shards} shards ({self.encoded} encoded now)"
        if len(self.tallies) == 1:
            said = f"{_counts(self.tallies[0])} in {said}"
        else:
            parts = (f"{side} px: {_counts(tally)}" for side, tally in zip(self.resolutions, self.tallies, strict=True))
            said += "".join(f"\n  {part}" for part in parts) + "\n"
        last = (
            "manifest written"
            if self.manifests
            else f"{self.waiting} shards are still to come (other workers', or added meanwhile)"
        )
        return f"{said.rstrip()}; {last}" if len(self.tallies) == 1 else f"{said}{last}"


def _counts(tally: Tally) -> str:
    said = f"{tally.samples} pictures"
    for count, word in (
        (tally.rejects.total(), "rejected"),
        (tally.unwanted - tally.removed, "left out by filters"),
        (tally.removed, "taken down"),
    ):
        if count or word == "rejected":
            said += f", {count} {word}"
    return said


def encode(
    config: EncodeConfig,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    encoder: EncodesAndDescribes | None = None,
) -> EncodeSummary:
    """Encode this worker's share, and fold the manifest if it is the last to finish.

    Shards that are committed with the same fingerprint and from the same source are left as they are. The finished
    data set has the same bytes for any number of workers and restarts, on equal hardware, threads and versions.

    Args:
        config: the job, the same for all workers.
        share: (index, count): takes every count-th source shard from the index-th on, counted from 0.
        progress: called at the start, once a second and at the end, from one thread at a time.
        encoder: stands in for the one that `config` describes.

    Raises:
        ConfigError: a share, filter, resolution or tower that cannot be.
        DataError: no shards, too many rejects, shards that were replaced after they were read, or an output of another
            fingerprint; it names the fields.
        StorageError: a source, the autoencoder or the output cannot be reached.
    """
    index, count = share
    if not 0 <= index < count:
        raise ConfigError(f"task {index}/{count}: not a share", "use I/N with I from 0 to N-1")
    Filters(config.images.filters)  # a mistake in it is told before models are loaded
    sources = find_sources(config)
    encoder = encoder or Encoder(config, place=index)
    targets = claim(config, encoder)
    mine = sources[index::count]
    tallies = tuple(Tally() for _ in targets)
    work = _work(targets, mine, tallies)
    meter = Meter(
        total_bytes=sum(one.source.bytes for one in work),
        total_shards=len(mine),
        decoders=decoder_count(config),
        uploaders=UPLOADERS,
        shards_before=len(mine) - len(work),
    )
    place = Place(config.output, number=index, count=count)
    with Metrics(config.metrics, "encode", place, traffic=counters) as metrics:
        tell(_introduction(config, encoder, targets, sources=sources, work=work, metrics=metrics.address))
        with Reporter(meter, metrics, progress), closing(Worker(config, encoder, targets, meter).run(work)) as finished:
            for number, receipt in finished:
                tallies[number].add(receipt)
                _warn_of_damage(receipt)
                check_rejects_so_far(tallies[number], config.max_reject_rate)
        try:
            waiting, manifests = _fold(config, targets, alone=count == 1)
        except Exception:
            metrics.set("finished", 0)  # else nobody is told of numbers that stay at a Pushgateway
            raise
    return EncodeSummary(config.images.resolutions, len(mine), len(work), tallies, waiting, manifests)


def finalize(config: EncodeConfig) -> tuple[Manifest, ...]:
    """Fold the manifest of each resolution from the receipts that the workers left; no model is loaded.

    The last worker does this by itself.

    Raises:
        DataError: shards are missing (named), nothing was encoded, or as `encode`.
    """
    return _fold_all(config, claimed(config), find_sources(config))


def _work(targets: Sequence[Target], mine: Sequence[Source], tallies: Sequence[Tally]) -> list[Work]:
    """What is left to do of this worker's share."""
    digests: dict[str, str] = {}  # of sources that were written anew, read once for all targets
    done = [committed(target, mine, tally, digests) for target, tally in zip(targets, tallies, strict=True)]
    work = []
    for source in mine:
        lacking = tuple(number for number, shards in enumerate(done) if source.shard not in shards)
        if lacking:
            work.append(Work(source, lacking))
    return work


def _fold(config: EncodeConfig, targets: Sequence[Target], *, alone: bool) -> tuple[int, tuple[Manifest, ...]]:
    """Shards still to come, or the manifests when there are none."""
    sources = find_sources(config)  # anew: others may have been added since, and their manifest must stand
    waiting = max(len(missing(target, sources)) for target in targets)
    if waiting:
        return waiting, ()
    try:
        return 0, _fold_all(config, targets, sources)
    except IncompleteError as error:  # another worker's receipts are there, but out of date: it will see to them
        if alone:
            raise
        return error.shards, ()


def _fold_all(config: EncodeConfig, targets: Sequence[Target], sources: Sequence[Source]) -> tuple[Manifest, ...]:
    """The manifest of each resolution; of several that cannot be folded, the first is told once the others are."""
    manifests: list[Manifest] = []
    failures: list[DataError] = []
    for target in targets:
        try:
            manifests.append(fold_output(config, target, sources))
        except DataError as error:
            failures.append(error)
    if failures:
        raise failures[0]
    return tuple(manifests)


def _introduction(
    config: EncodeConfig,
    encoder: Encodes,
    targets: Sequence[Target],
    *,
    sources: Sequence[Source],
    work: Sequence[Work],
    metrics: str,
) -> str:
    sizes = [
        f"{target.encoding.fingerprint.resolution} px"
        + (f" in {len(target.buckets)} buckets" if config.images.buckets else "")
        for target in targets
    ]
    text = config.text.mode + "".join(f", {tower.name}" for tower in config.text.towers)
    facts = {
        "shards": f"{len(work)} to encode of {len(sources)} ({sum(one.source.bytes for one in work) / 2**20:,.0f} MiB)",
        "pictures": ", ".join(sizes) + (", mirrored too" if config.images.flip else ""),
        "autoencoder": f"{config.autoencoder}, {config.precision} on {encoder.environment.get('device', '?')}",
        "text": f"{text}, {config.text.context_length} tokens",
        "metrics": metrics,
        "output": config.output,
    }
    return table({name: said for name, said in facts.items() if said})


def _warn_of_damage(receipt: Receipt) -> None:
    if any(reject.reason == SHARD_DAMAGED for reject in receipt.rejects):
        _log.warning("%s is damaged: %d pictures of it could be used", receipt.source, receipt.samples())
