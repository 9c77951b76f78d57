"""Rows of CSV, TSV, JSON lines and Parquet tables, one at a time, as Python values."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from pipeline.data.picture_item import UnusableError
from pipeline.errors import DataError, StorageError

_MAX_LINE = 64 * 2**20  # characters of one line of JSON
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,30})(\.\d{1,30})?([eE][-+]?\d{1,3})?")


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    where: str  # table:line, or table: row N
    number: int  # from 0, within its table
    fields: dict[str, Any]


class Table(Protocol):
    """A table that can be read again and again."""

    path: Path

    def columns(self, wanted: Collection[str]) -> list[str]:
        """Names of its columns; of JSON lines, those of the first rows that have all of `wanted`. Raises as `rows`."""
        ...

    def embeds(self, column: str) -> bool:
        """Whether the column's values are pictures themselves, not paths."""
        ...

    def rows(self, columns: Collection[str]) -> Iterator[Row | UnusableError]:
        """Its rows, with these columns at least. Raises DataError, StorageError."""
        ...

    def plain(self, value: Any) -> Any:
        """A field's value as JSON can say it."""
        ...


def open_table(path: Path) -> Table:
    """The table at a path, by the path's suffix.

    Raises:
        DataError: no such kind of table, or it cannot be read.
        SetupError: Parquet, without pyarrow.
        StorageError: it cannot be opened.
    """
    kind = TABLES.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path} is no table that Lathe reads", f"give one of {', '.join(TABLES)}, or a folder")
    return kind(path)


@contextmanager
def open_text(path: Path, newline: str | None = "") -> Iterator[TextIO]:
    """A file of UTF-8, with or without byte order mark; `newline` as `open` has it.

    Raises, for what happens while it is read too:
        DataError: it is not UTF-8, or not the CSV that it is read as.
        StorageError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", "save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read: {error}", "mend the table") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", "make the file readable") from error


def json_row(where: str, content: str) -> Any:
    """One line of JSON. Raises DataError naming the place `where`."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}", "mend the row") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets within brackets
        raise DataError(f"{where} cannot be read", "mend the row") from error


class _CsvTable:
    """Separated values with a header line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ""

    def columns(self, wanted: Collection[str] = ()) -> list[str]:
        with open_text(self.path) as file:
            return [name for name in next(self._reader(file), []) if name]

    def embeds(self, column: str) -> bool:
        return False

    def rows(self, columns: Collection[str] = ()) -> Iterator[Row | UnusableError]:
        with open_text(self.path) as file:
            reader = self._reader(file)
            try:
                header: list[str] = next(reader, [])
                number = 0
                for cells in reader:
                    if cells:
                        yield self._row(header, cells, reader.line_num, number)
                        number += 1
            except csv.Error as error:
                raise DataError(f"{self.path}:{reader.line_num} cannot be read: {error}", "mend the row") from error

    def _row(self, header: Sequence[str], cells: list[str], line: int, number: int) -> Row | UnusableError:
        where = f"{self.path}:{line}"
        if len(cells) != len(header):
            message = f"{where} has {len(cells)} fields, the header has {len(header)}"
            return UnusableError("bad_row", message, "put captions with a separator in them in double quotes")
        return Row(where, number, {name: cell for name, cell in zip(header, cells, strict=True) if name})

    def plain(self, value: Any) -> Any:
        """Numbers as JSON writes them become numbers, so that conditions can compare them; `007` stays text."""
        if not _NUMBER.fullmatch(value):
            return value or None
        if value.lstrip("-").isdecimal():
            return int(value)
        return number if math.isfinite(number := float(value)) else value

    def _reader(self, file: Any) -> Any:
        """A reader at the table's beginning. The separator is the one that most splits the header."""
        if not self._delimiter:
            start = file.read(1 << 16)
            file.seek(0)
            headers = {d: next(csv.reader(start.splitlines()[:1], delimiter=d), []) for d in ",;\t|"}
            self._delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
        return csv.reader(file, delimiter=self._delimiter, strict=True)


class _JsonTable:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def columns(self, wanted: Collection[str]) -> list[str]:
        seen: dict[str, None] = {}
        for row in self.rows():
            seen.update(dict.fromkeys(row.fields if isinstance(row, Row) else ()))
            if seen.keys() >= set(wanted):
                break
        return list(seen)

    def embeds(self, column: str) -> bool:
        return False

    def rows(self, columns: Collection[str] = ()) -> Iterator[Row | UnusableError]:
        number = 0
        with open_text(self.path) as file:
            for line, content in enumerate(iter(lambda: file.readline(_MAX_LINE), ""), 1):
                if content.strip():
                    yield self._row(content, line, number)
                    number += 1

    def _row(self, content: str, line: int, number: int) -> Row | UnusableError:
        where = f"{self.path}:{line}"
        if line == 1 and content.lstrip().startswith("["):
            raise DataError(
                f"{self.path} is one JSON list, not one object a line", "turn it into lines, with jq -c '.[]' FILE"
            )
        try:
            fields = json_row(where, content)
        except DataError as error:
            return UnusableError("bad_row", error.message, error.remedy)
        if not isinstance(fields, dict):
            return UnusableError("bad_row", f"{where} is not a JSON object", "write one object a line")
        return Row(where, number, fields)

    def plain(self, value: Any) -> Any:
        return _plain(value)


class _ParquetTable:
    """Parquet; columns that nobody asked for are not read."""

    def __init__(self, path: Path) -> None:
        from pipeline.data.parquet import ParquetTable  # an extra: only who has such tables needs it

        self.path = path
        self._table = ParquetTable(path)

    def columns(self, wanted: Collection[str] = ()) -> list[str]:
        return self._table.columns

    def embeds(self, column: str) -> bool:
        return self._table.holds_bytes(column)

    def rows(self, columns: Collection[str] = ()) -> Iterator[Row | UnusableError]:
        for number, fields in enumerate(self._table.rows(list(columns))):
            yield Row(f"{self.path}: row {number + 1}", number, fields)

    def plain(self, value: Any) -> Any:
        return _plain(value)


def _plain(value: Any) -> Any:
    """Not-a-number and infinity become null, times ISO 8601, durations seconds, exact decimals floats."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, float | Decimal):
        value = number if math.isfinite(number := float(value)) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, date | time):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


TABLES: dict[str, type[_CsvTable] | type[_JsonTable] | type[_ParquetTable]] = {
    ".csv": _CsvTable,
    ".tsv": _CsvTable,
    ".jsonl": _JsonTable,
    ".ndjson": _JsonTable,
    ".json": _JsonTable,
    ".parquet": _ParquetTable,
}
