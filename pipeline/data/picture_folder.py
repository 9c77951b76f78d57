"""A folder of pictures with their captions: NAME.txt beside NAME.png, or one table of file names."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.picture_item import Item, UnusableError, safe_key
from pipeline.data.samples import IMAGE_EXTENSIONS
from pipeline.data.table_rows import json_row, open_text
from pipeline.errors import DataError, StorageError

_TABLES = ("metadata.jsonl", "metadata.csv")
_REMEDY = "write NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text"

_Captions = dict[str, tuple[str, dict[str, Any]]]  # file name -> caption, further columns


def find_items(folder: Path, *, skip: bool = False) -> list[Item | UnusableError]:
    """The pictures of a folder with their captions, in the table's order or, without a table, by name.

    Args:
        folder: its sub-folders count, hidden files do not.
        skip: pictures without a caption, and rows without their picture, are listed as UnusableError behind the others.

    Raises:
        DataError: no pictures, a picture without caption, two of one key, or a table that cannot be used.
        StorageError: no such folder, or a table or text file that cannot be read.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder", "set source to a local folder of pictures, or to a table")
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
        raise DataError(f"{folder} holds no pictures", _what_else(folder))
    unusable: list[UnusableError] = []
    captions = _from_table(tables[0], pictures, unusable) if tables else _from_text_files(pictures)
    missing = [name for name in pictures if not captions.get(name, ("", {}))[0]]
    if not skip and unusable:
        raise unusable[0]
    if not skip and missing:
        raise DataError(f"{len(missing)} of {len(pictures)} pictures have no caption, first {missing[0]}", _REMEDY)
    for name in missing:
        unusable.append(UnusableError("no_caption", f"{pictures[name]} has no caption", _REMEDY))
    items = [
        Item(safe_key(name), str(pictures[name]), pictures[name], (text,), columns)
        for name, (text, columns) in captions.items()
        if text
    ]
    _refuse_duplicates(items)
    return [*items, *unusable]


def _what_else(folder: Path) -> str:
    for suffix in ("parquet", "csv", "tsv", "jsonl"):
        if next(folder.rglob(f"*.{suffix}"), None):
            return f"to pack its tables, set source={folder}/**/*.{suffix}"
    return "set source to a folder of .png, .jpg, .webp, ... files"


def _visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _refuse_duplicates(items: Sequence[Item]) -> None:
    seen: dict[str, Item] = {}
    for item in items:
        if item.key in seen:
            first, second = Path(seen[item.key].where).name, Path(item.where).name
            raise DataError(f"{first} and {second} would both have the key {item.key!r}", "rename one")
        seen[item.key] = item


def _from_text_files(pictures: dict[str, Path]) -> _Captions:
    captions: _Captions = {}
    for name, path in pictures.items():
        captions[name] = "", {}
        if (text := path.with_suffix(".txt")).is_file():
            with open_text(text, newline=None) as file:
                captions[name] = file.read().strip(), {}
    return captions


def _from_table(table: Path, pictures: dict[str, Path], unusable: list[UnusableError]) -> _Captions:
    captions: _Captions = {}
    for line, row in _rows(table):
        name, text = row.pop("file_name", None), row.pop("text", None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise DataError(f"{table}:{line} lacks file_name or text", "every row needs both, as strings")
        name = name.removeprefix("./")
        if name not in pictures:
            message = f"{table}:{line} names {name}, which is no picture of the folder"
            unusable.append(UnusableError("missing_file", message, "correct or drop the row"))
        elif name in captions:
            raise DataError(f"{table}:{line} names {name} a second time", "keep one row for each picture")
        else:
            captions[name] = (text.strip(), row)
    return captions


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """As the datasets library writes such tables, and not as `table_rows` guesses at others: commas alone separate."""
    with open_text(table, newline=None) as file:
        if table.suffix == ".csv":
            for row in (reader := csv.DictReader(file, strict=True)):
                yield reader.line_num, {name: value for name, value in row.items() if isinstance(name, str)}
            return
        for line, content in enumerate(file, 1):
            if content.strip():
                row = json_row(f"{table}:{line}", content)
                if not isinstance(row, dict):
                    raise DataError(f"{table}:{line} is not a JSON object", _REMEDY)
                yield line, row
