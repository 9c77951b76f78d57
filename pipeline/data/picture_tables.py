"""Tables of pictures: which rows become which samples, found out before anything is written."""

from __future__ import annotations

import glob
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import PackConfig
from pipeline.data.manifest import key_hash
from pipeline.data.picture_item import Item, UnusableError, contained_key
from pipeline.data.table_rows import TABLES, Row, Table, open_table
from pipeline.errors import DataError, StorageError
from pipeline.storage import local_path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_SKIP = "correct the row, or set on_error=skip"


def is_table(source: str) -> bool:
    """Whether a source means tables, by its name, or by what stands there."""
    path = local_path(source)
    return not path.is_dir() and (path.suffix.lower() in TABLES or path.is_file() or glob.has_magic(source))


def find_tables(source: str) -> list[Path]:
    """The table at a path, or those that match a pattern (`**` reaches into sub-folders), sorted.

    Raises:
        StorageError: there is none.
    """
    path = local_path(source)
    found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
    tables = [path for path in found if path.is_file()]
    if not tables:
        raise StorageError(f"{source}: no such table", "check the path; patterns may have *, ? and **")
    return tables


@dataclass(frozen=True)
class _Opened:
    """A table, and which of its columns are read for what."""

    table: Table
    embedded: bool  # the pictures themselves are in it
    key_columns: list[str]  # what keys are made of
    columns: list[str]  # all but those of bytes, which JSON cannot say


class PictureTables:
    """The rows of one or several tables, as pictures to pack.

    They are read once when this is made, for count and keys, and once more for each iteration. A few rows are in memory
    at a time, and 8 bytes for each key while keys are compared.

    Args:
        config: source, columns, and whether what cannot be used is skipped.

    Raises:
        DataError: a column is missing, the picture column holds addresses, two rows
            would have one key, no rows, or a table that cannot be read.
        StorageError: no table, or it cannot be opened.
        SetupError: Parquet, without pyarrow.
    """

    def __init__(self, config: PackConfig) -> None:
        self._image, self._key_column = config.image_column, config.key_column
        self._caption_columns = (
            (config.caption_column,) if isinstance(config.caption_column, str) else config.caption_column
        )
        self._paths = find_tables(config.source)
        self._root = os.path.commonpath([path.absolute().parent for path in self._paths])
        self._count, self._repeated = 0, set[int]()
        self._survey(strict=config.on_error == "fail")

    def __len__(self) -> int:
        """Rows, usable or not."""
        return self._count

    def __iter__(self) -> Iterator[Item | UnusableError]:
        """Every row, in order; of rows with one key the first is used."""
        for opened in self._opened():
            for found in self._keyed(opened, opened.columns):
                try:
                    yield found if isinstance(found, UnusableError) else self._item(opened, *found)
                except UnusableError as error:
                    yield error

    def _survey(self, *, strict: bool) -> None:
        hashes = array("Q")
        for found in self._keys():
            self._count += 1
            if not isinstance(found, UnusableError):
                hashes.append(key_hash(found[1]))
        if not self._count:
            raise DataError("the table holds no rows", "give a table with a row for each picture")
        values, counts = np.unique(np.frombuffer(hashes, np.uint64), return_counts=True)
        self._repeated = set(values[counts > 1].tolist())
        self._seen: dict[str, str] = {}
        if self._repeated and strict:
            for found in self._keys():
                if isinstance(found, UnusableError) and found.reason == "duplicate_key":
                    raise found

    def _keys(self) -> Iterator[tuple[Row, str] | UnusableError]:
        for opened in self._opened():
            yield from self._keyed(opened, opened.key_columns)

    def _keyed(self, opened: _Opened, columns: list[str]) -> Iterator[tuple[Row, str] | UnusableError]:
        """Rows of a table with their keys."""
        for row in opened.table.rows(columns):
            try:
                if isinstance(row, UnusableError):
                    raise row
                key = self._key(opened, row)
                self._refuse_second(key, row.where)
                yield row, key
            except UnusableError as error:
                yield error

    def _refuse_second(self, key: str, where: str) -> None:
        if not self._repeated or key_hash(key) not in self._repeated:
            return
        if key in self._seen:
            raise UnusableError(
                "duplicate_key",
                f"{self._seen[key]} and {where} would both have the key {key!r}",
                "keep one row for each picture (caption_column may be a list), or name a key_column",
            )
        self._seen[key] = where

    def _opened(self) -> Iterator[_Opened]:
        """The tables, one after the other, their columns checked; wholly empty ones have none."""
        self._seen = {}  # where the keys were met that several rows have
        wanted = [self._image, *self._caption_columns, *([self._key_column] if self._key_column else [])]
        for path in self._paths:
            table = open_table(path)
            columns = table.columns(wanted)
            if missing := [name for name in wanted if columns and name not in columns]:
                raise DataError(
                    f"{path} has no column {missing[0]}; it has {', '.join(columns)}",
                    "set image_column, caption_column or key_column",
                )
            if doubled := [name for name, count in Counter(columns).items() if count > 1]:
                raise DataError(f"{path} has two columns of the name {doubled[0]}", "rename one")
            embedded = self._image in columns and table.embeds(self._image)
            first = self._key_column or (self._caption_columns[0] if embedded else self._image)
            plain = [name for name in columns if name == self._image or not table.embeds(name)]
            yield _Opened(table, embedded, [first], plain)

    def _key(self, opened: _Opened, row: Row) -> str:
        try:
            if self._key_column:
                return contained_key(_key_text(row.fields.get(self._key_column)), is_file=False)
            if opened.embedded:
                table = opened.table.path.absolute().relative_to(self._root)
                return f"{contained_key(str(table.with_suffix('')), is_file=False)}/{row.number:08d}"
            return contained_key(self._within_root(opened.table.path, self._path(row)), is_file=True)
        except ValueError as error:
            raise UnusableError("bad_key", f"{row.where} gives no key: {error}", _SKIP) from error

    def _path(self, row: Row) -> str:
        """What the picture column has, where it is a path."""
        value = row.fields.get(self._image)
        if isinstance(value, Mapping):
            value = value.get("path")
        if isinstance(value, str) and _ADDRESS.match(value):
            raise DataError(
                f"{row.where}: column {self._image} holds addresses: {value[:80]}",
                "download the pictures with img2dataset, whose shards need no packing, or give local files",
            )
        if isinstance(value, str) and value.strip():
            return value.strip()
        said = "is empty" if _is_missing(value) else f"holds {type(value).__name__}, which is no path"
        raise UnusableError("no_image", f"{row.where}: column {self._image} {said}", _SKIP)

    def _within_root(self, table: Path, path: str) -> str:
        """The path seen from where all tables are, so that keys do not tell where that is."""
        absolute = os.path.normpath(table.absolute().parent / path)
        return os.path.relpath(absolute, self._root) if absolute.startswith(self._root + os.sep) else path

    def _item(self, opened: _Opened, row: Row, key: str) -> Item:
        value = row.fields.get(self._image)
        data = value.get("bytes") if isinstance(value, Mapping) else value
        picture = data if isinstance(data, bytes) else opened.table.path.parent / self._path(row)
        used = {self._image, self._key_column, *self._caption_columns}
        try:
            metadata = {name: opened.table.plain(value) for name, value in row.fields.items() if name not in used}
        except RecursionError as error:
            raise UnusableError("bad_row", f"{row.where} is nested too deeply", _SKIP) from error
        return Item(key, row.where, picture, self._captions(row), metadata)

    def _captions(self, row: Row) -> tuple[str, ...]:
        captions = []
        for column in self._caption_columns:
            value = row.fields.get(column)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    captions.append(text.encode("utf-8", "replace").decode().strip())
                elif not _is_missing(text):
                    message = f"{row.where}: column {column} holds {type(text).__name__}, not text"
                    raise UnusableError("caption_not_text", message, _SKIP)
        captions = [caption for caption in captions if caption]
        if not captions:
            raise UnusableError("no_caption", f"{row.where} has no caption", _SKIP)
        return tuple(captions)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))  # pandas' missing text


def _key_text(value: Any) -> str:
    """Raises ValueError for what is neither text nor a whole number."""
    if isinstance(value, float) and value.is_integer():  # whole numbers, where pandas had missing ones among them
        value = int(value)
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    raise ValueError("it is empty" if _is_missing(value) else f"it is {type(value).__name__}, not text")
