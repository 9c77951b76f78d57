"""Which image shards there are, and the latent shard that each becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config import EncodeConfig
from pipeline.data.manifest import ENCODING
from pipeline.errors import ConfigError, DataError
from pipeline.storage import ShardAddress, find_shard_entries, local_path, open_store, split


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

    Latent shards that the job itself writes below one of the patterns are no sources.

    Raises:
        DataError: none, or two of one name.
        ConfigError: they stand in the output folder.
        StorageError: a place cannot be read.
    """
    parts = config.images.shard_name_parts
    sources = []
    for entry in _outside(find_shard_entries(config.images.shards), output_urls(config)):
        name = "/".join(_below_root(entry.url).split("/")[-parts:])
        shard = name if name.endswith(".tar") else f"{name}.tar"
        if not shard.isprintable() or "\\" in shard:
            raise DataError(f"image shard {entry.url!r}: its name cannot be a latent shard's", "rename it")
        sources.append(Source(entry.url, entry.size, entry.version, name, shard))
    repeated = [name for name, count in Counter(source.shard for source in sources).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} names stand for several image shards each, first {repeated[0]}",
            f"set images.shard_name_parts={parts + 1}, to tell them by their folders, or encode to different outputs",
        )
    return sorted(sources, key=lambda source: source.shard)


def output_urls(config: EncodeConfig) -> dict[int, str]:
    """The place of each resolution: the output itself, or a sub-folder for each where several are listed."""
    if isinstance(config.images.resolution, int):
        return {config.images.resolution: config.output}
    return {side: f"{config.output.rstrip('/')}/{side}" for side in config.images.resolutions}


def _outside(entries: Iterable[ShardAddress], outputs: dict[int, str]) -> list[ShardAddress]:
    """The shards that stand in no output. In one that nothing was encoded to yet, they are the user's own."""
    places = {_place(url): url for url in outputs.values()}
    folders: dict[str, tuple[str, str | None]] = {}  # of shards: where it is, and the output that it is in
    found, seen = [], set[tuple[str, str]]()
    for entry in entries:
        folder, name = split(entry.url)
        if folder not in folders:
            place = _place(folder)
            inside = (url for output, url in places.items() if f"{place}/".startswith(f"{output}/"))
            folders[folder] = place, next(inside, None)
        place, output = folders[folder]
        if output is None:
            if (place, name) not in seen:  # one shard may be spelled in two ways
                seen.add((place, name))
                found.append(entry)
        elif not open_store(output).exists(ENCODING):
            raise ConfigError(f"output: {output} is where the image shards are", "choose another output")
    if not found:
        raise DataError("images.shards: all of them are in the output", "choose another output")
    return found


def _place(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(local_path(url).resolve()).rstrip("/")


def _below_root(url: str) -> str:
    """The path within the bucket, or the local path without its leading slash."""
    if "://" in url:
        return url.partition("://")[2].partition("/")[2]
    return str(local_path(url)).lstrip("/")
