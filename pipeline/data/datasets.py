"""What a run is trained on: one or several latent data sets, whole or in part, as streams and groups for `order`."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.config import DataSetConfig
from pipeline.data.manifest import Bucket, Manifest, Split, canonical
from pipeline.data.mixture import check_weights, group_by_batches, group_by_steps, mean_and_std, proportions
from pipeline.data.order import VERSION, Group, Integers
from pipeline.data.sealed import load_sealed_manifest
from pipeline.data.subset import KeyList, Selection, read_keys, select, shards_to_read
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Store

Mixing = Literal["steps", "batches"]
Progress = Callable[[int, int], None]

_MUST_AGREE = (
    "autoencoder_weights",
    "autoencoder_config",
    "normalisation",
    "dtype",
    "text_mode",
    "text_padding",
    "text_precision",
    "text_towers",
)


@dataclass(frozen=True)
class StreamInfo:
    """The pictures of one size in one data set."""

    dataset: int
    bucket: Bucket
    sizes: Integers  # [shards], how many of each of the data set's shards take part

    @property
    def samples(self) -> int:
        """How many take part."""
        return int(self.sizes.sum())


@dataclass(frozen=True)
class DataSets:
    """Opened data sets; see `open_datasets`. Legend: C latent channels."""

    split: Split
    manifests: tuple[Manifest, ...]
    stores: tuple[Store, ...]  # the manifests' folders
    streams: tuple[StreamInfo, ...]  # by data set, then bucket; none without samples
    groups: tuple[Group, ...]
    mean: tuple[float, ...]  # [C] of the mixture, by the manifests; the hold-out is whitened with the training split's
    std: tuple[float, ...]  # [C]
    identity: str  # digest of all that the order depends on, beside seed, global batch and window
    _selections: tuple[Selection | None, ...]

    @property
    def samples(self) -> int:
        """How many take part, of all data sets."""
        return sum(stream.samples for stream in self.streams)

    def mean_and_std(
        self, normalisation: Literal["whiten", "scaling_factor"]
    ) -> tuple[Sequence[float], Sequence[float]]:
        """By which latents are brought to their scale, (z - mean) / std, each [C].

        Args:
            normalisation: "whiten" = their own; "scaling_factor" = the autoencoder's, as diffusers' pipelines have it.
        """
        if normalisation == "whiten":
            return self.mean, self.std
        first = self.manifests[0]
        return (first.shift_factor,) * len(self.mean), (1.0 / first.scaling_factor,) * len(self.std)

    def selected(self, dataset: int, shard: int, bucket: Bucket) -> Integers | None:
        """Which of a shard's training samples of a bucket take part: ascending numbers; None where all do."""
        if (selection := self._selections[dataset]) is None:
            return None
        return selection.numbers(shard, self.manifests[dataset].shards[shard], bucket)


def open_datasets(
    sources: Sequence[DataSetConfig],
    *,
    global_batch: int,
    mixing: Mixing = "steps",
    split: Split = "train",
    progress: Progress | None = None,
) -> DataSets:
    """Read the manifests, and the receipts of data sets that take part with a share or a list of keys.

    Args:
        sources: the data sets, at least one.
        global_batch: samples per step over all ranks.
        mixing: "steps" = each step takes one data set and bucket; "batches" = each batch holds of every data set that
            has the bucket a constant number of samples, at least one.
        split: which samples; of the hold-out all take part, whatever share and keys say.
        progress: called with the receipts read and all that will be, from this thread.

    Raises:
        ConfigError: weights for some data sets only; more data sets than a batch has places; nothing is left of a data
            set; the same latents twice.
        DataError: a manifest, receipt or list of keys cannot be used; the data sets do not fit together; no sample.
        StorageError: one of the files cannot be read.
    """
    if not sources:
        raise ConfigError("datasets: there is none", "give the address of a manifest")
    if split == "holdout":
        sources = [source.model_copy(update={"share": 1.0, "keys": None}) for source in sources]
    check_weights([source.weight for source in sources])
    manifests = tuple(load_sealed_manifest(source.manifest) for source in sources)
    _check_together(sources, manifests)
    stores = tuple(storage.open_store(storage.split(source.manifest)[0]) for source in sources)
    lists = [None if source.keys is None else read_keys(source.keys) for source in sources]
    selections = _select(sources, manifests, stores, lists, progress)
    streams = _streams(manifests, selections, split)
    samples = [sum(stream.samples for stream in streams if stream.dataset == n) for n in range(len(sources))]
    _check_samples(sources, manifests, samples, split)
    drawn = proportions([source.weight for source in sources], samples)
    mean, std = mean_and_std(drawn, [m.mean for m in manifests], [m.std for m in manifests])
    told = [
        {
            "content_hash": manifest.content_hash,
            "weight": str(part),
            "share": source.share,
            "keys": keys and keys.digest(),
        }
        for source, manifest, part, keys in zip(sources, manifests, drawn, lists, strict=True)
    ]
    return DataSets(
        split=split,
        manifests=manifests,
        stores=stores,
        streams=streams,
        groups=_groups(streams, drawn, samples, mixing, global_batch),
        mean=mean,
        std=std,
        identity=_identity(split, mixing, told),
        _selections=selections,
    )


def _check_together(sources: Sequence[DataSetConfig], manifests: Sequence[Manifest]) -> None:
    """Whether one network can be trained on all of them, and each is another one."""
    first, seen = manifests[0], dict[str, int]()
    for number, manifest in enumerate(manifests):
        where = sources[number].manifest
        differ = [name for name in first.fingerprint.difference(manifest.fingerprint) if name in _MUST_AGREE]
        differ += [n for n in ("latent_channels", "downsampling_factor") if getattr(first, n) != getattr(manifest, n)]
        if differ:
            raise DataError(
                f"{sources[0].manifest} and {where} cannot be trained on together: they differ in {', '.join(differ)}",
                "encode both with the same autoencoder and text settings",
            )
        if (earlier := seen.setdefault(manifest.content_hash, number)) != number:
            raise ConfigError(
                f"datasets.{number}.manifest: {where} holds the same shards as datasets.{earlier}.manifest",
                "leave one of them out; weight says how often a data set is drawn from",
            )


def _check_samples(
    sources: Sequence[DataSetConfig], manifests: Sequence[Manifest], samples: Sequence[int], split: Split
) -> None:
    if split == "holdout":
        if not any(samples):
            said = " and ".join(source.manifest for source in sources)
            raise DataError(f"{said}: no sample is held out", "encode with images.holdout above 0")
        return
    for number, (source, manifest) in enumerate(zip(sources, manifests, strict=True)):
        if samples[number]:
            continue
        if not (there := manifest.samples("train")):
            raise DataError(
                f"{source.manifest}: there is no sample to train on",
                "look at the manifest's rejects and its hold-out share",
            )
        listed = "listed ones among the " if source.keys is not None else ""
        raise ConfigError(
            f"datasets.{number}.share: {source.share:g} leaves none of the {listed}{there} training samples of"
            f" {source.manifest}",
            "raise share, or leave it out to train on all",
        )


def _select(
    sources: Sequence[DataSetConfig],
    manifests: Sequence[Manifest],
    stores: Sequence[Store],
    lists: Sequence[KeyList | None],
    progress: Progress | None,
) -> tuple[Selection | None, ...]:
    """What takes part of each data set, None where all does."""
    partly = [source.share < 1 or keys is not None for source, keys in zip(sources, lists, strict=True)]
    total = sum(len(shards_to_read(manifest)) for manifest, part in zip(manifests, partly, strict=True) if part)
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tuple(
        select(stores[n], manifests[n], sources[n].share, lists[n], tick) if part else None
        for n, part in enumerate(partly)
    )


def _streams(
    manifests: Sequence[Manifest], selections: Sequence[Selection | None], split: Split
) -> tuple[StreamInfo, ...]:
    return tuple(
        StreamInfo(number, bucket, sizes)
        for number, (manifest, selection) in enumerate(zip(manifests, selections, strict=True))
        for bucket, sizes in (selection.sizes if selection else _sizes(manifest, split)).items()
        if sizes.any()
    )


def _sizes(manifest: Manifest, split: Split) -> dict[Bucket, Integers]:
    """How many samples of the split each shard has, by bucket: [shards]."""
    sizes = {bucket: np.zeros(len(manifest.shards), np.int64) for bucket in manifest.buckets(split)}
    for number, entry in enumerate(manifest.shards):
        for here in entry.buckets:
            if count := here.train if split == "train" else here.holdout:
                sizes[here.bucket][number] = count
    return sizes


def _groups(
    streams: Sequence[StreamInfo], drawn: Sequence[Fraction], samples: Sequence[int], mixing: Mixing, global_batch: int
) -> tuple[Group, ...]:
    parts = [drawn[stream.dataset] * Fraction(stream.samples, samples[stream.dataset]) for stream in streams]
    if mixing == "steps":
        return group_by_steps(parts, global_batch)
    return group_by_batches(parts, [stream.bucket for stream in streams], global_batch)


def _identity(split: Split, mixing: Mixing, datasets: Sequence[dict[str, Any]]) -> str:
    """Addresses do not count; nor does `mixing` where there is nothing to mix."""
    mixing = mixing if len(datasets) > 1 else "steps"
    whole = {"order_version": VERSION, "split": split, "mixing": mixing, "datasets": list(datasets)}
    return hashlib.sha256(canonical(whole)).hexdigest()
