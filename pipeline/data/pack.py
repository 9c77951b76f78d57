"""`lathe pack`: a folder or a table of captioned pictures into WebDataset image shards. The bytes stay as they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from webdataset.writer import TarWriter

from pipeline.config import PackConfig
from pipeline.data.picture_folder import find_items
from pipeline.data.picture_item import Item, UnusableError, safe_key
from pipeline.data.picture_tables import PictureTables, is_table
from pipeline.errors import DataError, StorageError
from pipeline.storage import Store, local_path, open_store

__all__ = ["PackSummary", "attribution", "pack", "safe_key"]

ATTRIBUTION = "ATTRIBUTION.txt"


@dataclass
class Skipped:
    """Pictures that were left out for one reason."""

    count: int
    first: str  # what was wrong with the first of them


@dataclass(frozen=True)
class PackSummary:
    """What `pack` did."""

    pictures: int
    shards: int
    written: int  # shards that were not there already
    skipped: dict[str, Skipped] = field(default_factory=dict)  # by reason

    def __str__(self) -> str:
        lines = [f"packed {self.pictures} pictures in {self.shards} shards ({self.written} written)"]
        if self.skipped:
            lines.append(f"skipped {sum(skipped.count for skipped in self.skipped.values())}:")
            lines += [f"  {why}: {skipped.count}, first: {skipped.first}" for why, skipped in self.skipped.items()]
        return "\n".join(lines)


def pack(config: PackConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> PackSummary:
    """Write the source's pictures as shards `00000.tar`, `00001.tar`, ...: KEY.png, KEY.txt and KEY.json.

    The same source gives the same bytes; shards that are there already are not written again. One shard is in memory at
    a time.

    Args:
        config: source, output, columns of a table, shard size.
        progress: called with (pictures seen, pictures in all).

    Raises:
        DataError: no pictures, a picture without caption, two of one key, a file that is no picture, a table that
            cannot be used, or an output that holds other shards.
        StorageError: source or output cannot be reached.
        SetupError: a Parquet table, and no pyarrow.
    """
    found, what = _open_source(config)
    shards = _Shards(config, open_store(config.output), what, most=-(-len(found) // config.samples_per_shard))
    progress(0, len(found))
    for seen, item in enumerate(found, 1):
        try:
            if isinstance(item, UnusableError):
                raise item
            shards.add(item)
        except UnusableError as error:
            if config.on_error == "fail":
                raise
            shards.skip(error)
        if shards.is_full:
            shards.write()
            progress(seen, len(found))
    summary = shards.finish()
    progress(len(found), len(found))
    return summary


def attribution(store: Store) -> str:
    """Whom the pictures of a folder of shards are by; empty where nobody said so."""
    return store.read(ATTRIBUTION).decode("utf-8", "replace").strip() if store.exists(ATTRIBUTION) else ""


def _open_source(config: PackConfig) -> tuple[list[Item | UnusableError] | PictureTables, str]:
    """What is to be packed, in order, and what to call where it is from."""
    if "://" in config.source:
        raise StorageError(f"source: {config.source} is no local path", "copy the pictures to this machine first")
    if is_table(config.source):
        return PictureTables(config), "this table"
    return find_items(local_path(config.source), skip=config.on_error == "skip"), "this folder"


class _Shards:
    """The output: the shard that is being filled, and what was done.

    Args:
        config: output, samples per shard, attribution.
        store: of the output.
        source: what the pictures are from, for a person.
        most: shards that there can be.

    Raises:
        DataError: the output holds others.
    """

    def __init__(self, config: PackConfig, store: Store, source: str, most: int) -> None:
        self._config, self._store, self._source = config, store, source
        self._there = {entry.name: entry.size for entry in store.list() if entry.name.endswith(".tar")}
        self._refuse_others(most)
        self._samples: list[dict[str, str | bytes]] = []
        self._pictures, self._shards, self._written = 0, 0, 0
        self._skipped: dict[str, Skipped] = {}

    @property
    def is_full(self) -> bool:
        return len(self._samples) == self._config.samples_per_shard

    def add(self, item: Item) -> None:
        """Raises as `Item.members`."""
        self._samples.append(item.members())

    def skip(self, error: UnusableError) -> None:
        self._skipped.setdefault(error.reason, Skipped(0, error.message)).count += 1

    def write(self) -> None:
        """Close the shard; it is written where it is not there already."""
        name, data = f"{self._shards:05d}.tar", _tar(self._samples)
        if self._there.get(name) != len(data) or self._store.read(name) != data:
            self._store.write(name, data)
            self._written += 1
        self._shards += 1
        self._pictures += len(self._samples)
        self._samples = []

    def finish(self) -> PackSummary:
        """Write what is left.

        Raises:
            DataError: there was not one usable picture, or shards of an earlier packing are left over.
        """
        if self._samples:
            self.write()
        if not self._pictures:
            reasons = ", ".join(f"{reason}: {skipped.count}" for reason, skipped in self._skipped.items())
            first = next(iter(self._skipped.values())).first
            raise DataError(f"no picture can be used ({reasons}); {first}", "mend the source, or name other columns")
        self._refuse_others(self._shards)
        if self._config.attribution:
            text = (self._config.attribution.strip() + "\n").encode("utf-8", "replace")
            self._store.write(ATTRIBUTION, text)
        return PackSummary(self._pictures, self._shards, self._written, self._skipped)

    def _refuse_others(self, shards: int) -> None:
        if strange := sorted(set(self._there) - {f"{i:05d}.tar" for i in range(shards)}):
            raise DataError(
                f"{self._config.output} holds shards that {self._source} does not give: {strange[0]}",
                "choose another output, or delete them if they are not needed",
            )


def _tar(samples: Iterable[dict[str, str | bytes]]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for sample in samples:
            tar.write(sample)
    return stream.getvalue()
