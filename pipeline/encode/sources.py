"""Which image shards there are, and the latent shard that each becomes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError, DataError
from pipeline.storage import find_shard_entries, local_path, split


@dataclass(frozen=True, slots=True)
class Source:
    """An image shard, and the name of the latent shard that it becomes."""

    url: str
    bytes: int
    version: str  # what the store knows the file's state by
    name: str  # as receipts and KEY.json have it
    shard: str


def find_sources(config: EncodeConfig) -> list[Source]:
    """The image shards, in order of name: not of address, so that the data may move.

    Raises:
        DataError: none, or two of one name.
        ConfigError: they stand in the output folder.
        StorageError: a place cannot be read.
    """
    parts = config.images.shard_name_parts
    sources = []
    for entry in find_shard_entries(config.images.shards):
        if _place(split(entry.url)[0]) in _outputs(config):
            raise ConfigError(f"output: {config.output} is where the image shards are", "choose another output")
        name = "/".join(_below_root(entry.url).split("/")[-parts:])
        shard = name if name.endswith(".tar") else f"{name}.tar"
        sources.append(Source(entry.url, entry.size, entry.version, name, shard))
    repeated = [name for name, count in Counter(source.shard for source in sources).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} names stand for several image shards each, first {repeated[0]}",
            f"set images.shard_name_parts={parts + 1}, to tell them by their folders, or encode to different outputs",
        )
    return sorted(sources, key=lambda source: source.shard)


def _outputs(config: EncodeConfig) -> set[str]:
    below = (f"{config.output.rstrip('/')}/{resolution}" for resolution in config.images.resolutions)
    return {_place(config.output), *map(_place, below)}


def _place(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(local_path(url).resolve())


def _below_root(url: str) -> str:
    """The path within the bucket, or the local path without its leading slash."""
    if "://" in url:
        return url.partition("://")[2].partition("/")[2]
    return str(local_path(url)).lstrip("/")
