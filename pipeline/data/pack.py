"""`lathe pack`: a folder of captioned pictures into WebDataset image shards. The pictures' bytes stay as they are."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.writer import TarWriter

from pipeline.config import PackConfig
from pipeline.data import images
from pipeline.data.samples import IMAGE_EXTENSIONS
from pipeline.errors import DataError, StorageError
from pipeline.storage import Store, local_path, open_store

ATTRIBUTION = "ATTRIBUTION.txt"
_TABLES = ("metadata.jsonl", "metadata.csv")
_REMEDY = "write NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text"


@dataclass(frozen=True)
class Item:
    """One picture of the folder."""

    key: str
    path: Path
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PackSummary:
    """What `pack` did."""

    pictures: int
    shards: int
    written: int  # shards that were not there already

    def __str__(self) -> str:
        return f"packed {self.pictures} pictures in {self.shards} shards ({self.written} written)"


def pack(config: PackConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> PackSummary:
    """Write the folder's pictures as shards `00000.tar`, `00001.tar`, ...: KEY.png, KEY.txt and KEY.json.

    The same folder gives the same bytes; shards that are there already are not written again.

    Args:
        config: source, output and shard size.
        progress: called with (pictures done, pictures in all).

    Raises:
        DataError: no pictures, a picture without caption, two of one key, a file that is no picture, or an output
            that holds other shards.
        StorageError: source or output cannot be reached.
    """
    items = find_items(local_path(config.source))
    store = open_store(config.output)
    starts = range(0, len(items), config.samples_per_shard)
    names = [f"{i:05d}.tar" for i in range(len(starts))]
    there = {entry.name: entry.size for entry in store.list() if entry.name.endswith(".tar")}
    if strange := sorted(set(there) - set(names)):
        raise DataError(
            f"{config.output} holds shards that this folder does not give: {strange[0]}",
            "choose another output, or delete them if they are not needed",
        )
    progress(0, len(items))
    written = 0
    for name, start in zip(names, starts, strict=True):
        part = items[start : start + config.samples_per_shard]
        data = _shard(part)
        if there.get(name) != len(data) or store.read(name) != data:
            store.write(name, data)
            written += 1
        progress(start + len(part), len(items))
    if config.attribution:
        store.write(ATTRIBUTION, (config.attribution.strip() + "\n").encode("utf-8", "replace"))
    return PackSummary(len(items), len(names), written)


def attribution(store: Store) -> str:
    """Whom the pictures of a folder of shards are by; empty where nobody said so."""
    return store.read(ATTRIBUTION).decode("utf-8", "replace").strip() if store.exists(ATTRIBUTION) else ""


def find_items(folder: Path) -> list[Item]:
    """The pictures of a folder with their captions, in the table's order or, without a table, by name.

    Raises:
        DataError: see `pack`.
        StorageError: no such folder.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder", "set source to a local folder of pictures")
    pictures = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
        and _visible(path.relative_to(folder))
        and not path.is_dir()
    }
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder} has both {_TABLES[0]} and {_TABLES[1]}", "keep one of them")
    if not pictures:
        raise DataError(f"{folder} holds no pictures", "set source to a folder of .png, .jpg, .webp, ... files")
    captions = _from_table(tables[0], pictures) if tables else _from_text_files(pictures)
    missing = [name for name in pictures if not captions.get(name, ("", {}))[0]]
    if missing:
        raise DataError(f"{len(missing)} of {len(pictures)} pictures have no caption, first {missing[0]}", _REMEDY)
    items = [Item(safe_key(name), pictures[name], *captions[name]) for name in captions]
    _refuse_duplicates(items)
    return items


def safe_key(name: str) -> str:
    """The sample key of a file: its path without suffix, and without what would change its meaning in a shard.

    Dots of the file's name (a key ends at the first), control characters and bytes that are not UTF-8 become `_`;
    so does a leading `__`, by which webdataset knows its own entries.
    """
    path = PurePosixPath(name)
    key = (path.parent / path.stem.replace(".", "_")).as_posix()
    return "".join(c if c.isprintable() else "_" for c in re.sub("^__", "_", key))


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _refuse_duplicates(items: Sequence[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        if item.key in seen:
            raise DataError(
                f"{seen[item.key].path.name} and {item.path.name} would both have the key {item.key!r}", "rename one"
            )
        seen[item.key] = item


_Captions = dict[str, tuple[str, dict[str, Any]]]  # file name -> caption, further columns


def _from_text_files(pictures: dict[str, Path]) -> _Captions:
    captions: _Captions = {}
    for name, path in pictures.items():
        text = path.with_suffix(".txt")
        try:
            captions[name] = (text.read_text(encoding="utf-8-sig").strip() if text.is_file() else "", {})
        except UnicodeDecodeError as error:
            raise DataError(f"{text} is not UTF-8", "save it as UTF-8") from error
    return captions


def _from_table(table: Path, pictures: dict[str, Path]) -> _Captions:
    captions: _Captions = {}
    for line, row in _rows(table):
        name, text = row.pop("file_name", None), row.pop("text", None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{table}:{line} lacks file_name or text", "every row needs both, as strings")
        name = name.removeprefix("./")
        if name not in pictures:
            raise DataError(
                f"{table}:{line} names {name}, which is no picture of the folder", "correct or drop the row"
            )
        if name in captions:
            raise DataError(f"{table}:{line} names {name} a second time", "keep one row for each picture")
        captions[name] = (text.strip(), row)
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            for row in (reader := csv.DictReader(io.StringIO(text, newline=""), strict=True)):
                yield reader.line_num, {name: value for name, value in row.items() if isinstance(name, str)}
            return
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                row = _json_row(table, line, content)
                if not isinstance(row, dict):
                    raise DataError(f"{table}:{line} is not a JSON object", _REMEDY)
                yield line, row
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8", "save it as UTF-8") from error
    except (csv.Error, ValueError) as error:
        raise DataError(f"{table} cannot be read: {error}", "mend the row") from error


def _json_row(table: Path, line: int, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{table}:{line} is not JSON: {error.msg} at column {error.colno}", "mend the row") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets within brackets
        raise DataError(f"{table}:{line} cannot be read", "mend the row") from error


def _shard(items: Sequence[Item]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for item in items:
            tar.write(_members(item))
    return stream.getvalue()


def _members(item: Item) -> dict[str, str | bytes]:
    try:
        data = item.path.read_bytes()
        images.probe(data)
    except OSError as error:
        raise StorageError(f"{item.path}: {error.strerror or error}", "make the file readable") from error
    except images.ImageError as error:
        raise DataError(f"{item.path} is not a usable picture: {error.reason}", "mend or remove the file") from error
    sample: dict[str, str | bytes] = {"__key__": item.key, item.path.suffix.lower()[1:]: data}
    sample["txt"] = item.caption.encode("utf-8", "replace")
    if item.metadata:
        sample["json"] = json.dumps({"caption": item.caption, **item.metadata}, sort_keys=True).encode("ascii")
    return sample
