"""What each resolution's output is for: noted by the first worker, checked by all others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
from pydantic import ValidationError

from pipeline.config import EncodeConfig
from pipeline.data.buckets import bucket_sizes
from pipeline.data.manifest import (
    EMPTY_PREFIX,
    ENCODING,
    RECEIPT_SUFFIX,
    Bucket,
    Fingerprint,
    Record,
    canonical,
    load_receipt,
)
from pipeline.data.tar import npy_bytes
from pipeline.encode.sources import output_urls
from pipeline.encode.takedown.keys import Takedown, read_takedown
from pipeline.errors import DataError
from pipeline.storage import Store, open_store

_LOOK_SECONDS, _EMPTY_SECONDS = 0.1, 1.0  # at a claim that its worker is just writing, or was killed at


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

    def check_claim(self) -> None:
        """Whether the output is still claimed for the same. Before its first shard another job may claim it.

        Raises:
            DataError: it is not.
        """
        if self.encoding.fingerprint.difference(_read(self.store).fingerprint):
            raise DataError(
                f"{self.store.url} was claimed meanwhile by a job with other settings",
                "stop one of the two jobs, and give them different outputs",
            )


def claim(config: EncodeConfig, encoder: Describes) -> list[Target]:
    """Note in each resolution's output what it is for, or check that it is for the same.

    Raises:
        DataError: an output holds latents of another meaning; the message names the fields that differ.
    """
    targets = []
    for resolution, url in output_urls(config).items():
        store = open_store(url)
        noted = _claim(store, _encoding(config, encoder, resolution))
        _write_empty(store, encoder.empty())
        targets.append(Target(store, noted, read_takedown(store)))
    return targets


def check_claims(config: EncodeConfig, encoder: Describes) -> None:
    """Whether `claim` would take the outputs as they are now; nothing is written. Raises as that."""
    for resolution, url in output_urls(config).items():
        store, encoding = open_store(url), _encoding(config, encoder, resolution)
        if _content(store):
            _refuse_others(store, _read(store), encoding)
        else:
            _refuse_strangers(store, encoding)


def _encoding(config: EncodeConfig, encoder: Describes, resolution: int) -> Encoding:
    return Encoding(
        fingerprint=encoder.fingerprint(resolution),
        autoencoder=lasting(config.autoencoder),
        latent_channels=encoder.channels,
        downsampling_factor=encoder.downsampling_factor,
        scaling_factor=encoder.scaling_factor,
        shift_factor=encoder.shift_factor,
    )


def claimed(config: EncodeConfig) -> list[Target]:
    """The outputs as workers have claimed them.

    Raises:
        DataError: none has, or for other settings, as far as can be told without the models.
    """
    targets = []
    for resolution, url in output_urls(config).items():
        store = open_store(url)
        encoding = _read(store)
        said = {**settings(config, resolution), "context_length": config.text.context_length}
        if fields := [name for name, value in said.items() if getattr(encoding.fingerprint, name) != value]:
            raise DataError(
                f"{store.url} was encoded with other settings; these differ: {', '.join(fields)}",
                "use the run file that it was encoded with",
            )
        targets.append(Target(store, encoding, read_takedown(store)))
    return targets


def settings(config: EncodeConfig, resolution: int) -> dict[str, Any]:
    """The fields of the fingerprint that the run file tells by itself."""
    images = config.images
    return {
        "precision": config.precision,
        "tiling": config.tiling,
        "resolution": resolution,
        "buckets": bucket_sizes(resolution, images.buckets),
        "max_upscale": images.max_upscale,
        "flip": images.flip,
        "background": images.background,
        "filters": canonical(images.filters.model_dump(mode="json")).decode("ascii"),
        "text_mode": config.text.mode,
        "text_padding": config.text.padding,
        "text_precision": config.text.precision,
        "caption_field": images.caption_field,
        "holdout": images.holdout,
    }


def lasting(url: str) -> str:
    """An address that means the same from other folders: what is a folder here must not be looked for on a hub."""
    path = Path(url)
    try:
        return str(path.resolve()) if "://" not in url and path.exists() else url
    except OSError:
        return url


def _claim(store: Store, encoding: Encoding) -> Encoding:
    """What the output is claimed for, by us now or by another worker before."""
    if not store.exists(ENCODING):
        _refuse_strangers(store, encoding)
        if store.write(ENCODING, encoding.to_bytes(), if_absent=True):
            return encoding
    if _stays_empty(store):
        _refuse_strangers(store, encoding)
        store.write(ENCODING, encoding.to_bytes())
        return encoding
    noted = _read(store)
    if not noted.fingerprint.difference(encoding.fingerprint):
        return noted
    _refuse_others(store, noted, encoding)
    store.delete(entry.name for entry in store.list(EMPTY_PREFIX) if "/" not in entry.name)
    store.write(ENCODING, encoding.to_bytes())
    return encoding


def _refuse_others(store: Store, noted: Encoding, encoding: Encoding) -> None:
    """Raise DataError where shards are finished there that were made otherwise."""
    fields = noted.fingerprint.difference(encoding.fingerprint)
    if fields and any(entry.name.endswith(RECEIPT_SUFFIX) for entry in store.list()):
        said = ", ".join(_told(noted.fingerprint, encoding.fingerprint, name) for name in fields)
        raise DataError(
            f"{store.url} holds latents that were made otherwise; these differ: {said}",
            "choose another output, or use the settings and the autoencoder that it was begun with",
        )


def _stays_empty(store: Store) -> bool:
    """Folders without hard links show the file empty before it is written. One that stays so claims nothing."""
    deadline = time.monotonic() + _EMPTY_SECONDS
    while not _content(store):
        if time.monotonic() > deadline:
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _refuse_strangers(store: Store, encoding: Encoding) -> None:
    """Latents whose `encoding.json` is gone are known by their receipts."""
    name = next((entry.name for entry in store.list() if entry.name.endswith(RECEIPT_SUFFIX)), None)
    if name and load_receipt(store, name).fingerprint != encoding.fingerprint.digest():
        raise DataError(
            f"{store.url} holds latents that were made otherwise, and its {ENCODING} is gone",
            "choose another output, or use the settings and the autoencoder that it was begun with",
        )


def _write_empty(store: Store, empty: Mapping[str, npt.NDArray[Any]]) -> None:
    for stem, values in empty.items():
        store.write(f"{EMPTY_PREFIX}{stem}.npy", npy_bytes(values))


def _read(store: Store) -> Encoding:
    content = _content(store)
    if not content:
        raise DataError(f"{store.url} has no {ENCODING}: nothing was encoded here", "run lathe encode first")
    try:
        return Encoding.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{store.url}: {ENCODING} cannot be read",
            "delete it, and run the command that the output was begun with: what is finished is kept",
        ) from error


def _content(store: Store) -> bytes:
    """The bytes of the claim; empty = there is none yet."""
    return store.read(ENCODING) if store.exists(ENCODING) else b""


def _told(before: Fingerprint, now: Fingerprint, name: str) -> str:
    """A field with its two values, where they are short enough for a person."""
    values = [str(getattr(fingerprint, name)) for fingerprint in (before, now)]
    return name if max(map(len, values)) > 40 else f"{name} ({values[0]}, now {values[1]})"
