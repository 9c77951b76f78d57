"""Rows of a Parquet table, a few at a time. pyarrow, an extra, lives in this module alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import memory
from pipeline.errors import DataError, SetupError, StorageError

try:
    import pyarrow
    from pyarrow import parquet, types
except ModuleNotFoundError as missing:
    raise SetupError("Parquet tables need pyarrow", "pip install 'lathe-ldm[parquet]'") from missing

_BATCH_BYTES = 4 << 20
_BUFFER_BYTES = 1 << 20  # of a column; the unit is a page, which some writers make as large as their row group


class ParquetTable:
    """One file.

    Args:
        path: of the file; its footer is read at once.

    Raises:
        DataError: it is cut short, or not Parquet.
        SetupError: the machine is short of memory.
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _told(path):
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            self._schema = self._file.schema_arrow

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def columns(self) -> list[str]:
        """Their names, in the file's order."""
        return list(self._schema.names)

    def holds_bytes(self, column: str) -> bool:
        """Whether there are bytes in its values, at any depth, as in Hugging Face's struct of bytes and path."""
        return _has_bytes(self._schema.field(column).type)

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows as Python values; times of nanoseconds are cut to microseconds. Raises as the class."""
        with _told(self._path):
            rows = self._batch_rows()
            for batch in self._file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False):
                values = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    plain = _microseconds(column.type)
                    values[name] = (column if plain == column.type else column.cast(plain, safe=False)).to_pylist()
                for i in range(batch.num_rows):
                    yield {name: column[i] for name, column in values.items()}

    def _batch_rows(self) -> int:
        facts = self._file.metadata
        size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
        return int(min(max(_BATCH_BYTES * len(self) // max(size, 1), 1), 1024))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno:
            raise StorageError(f"{path}: {error.strerror or error}", "make the file readable") from error
        raise _damaged(path, error) from error
    except MemoryError as error:
        if memory.is_scarce():
            raise SetupError(f"{path}: out of memory while reading it", "give this process more memory") from error
        raise _damaged(path, error) from error
    except (pyarrow.ArrowException, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> DataError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"{path} cannot be read as Parquet: {said}", "it may be cut short or damaged: fetch it again")


def _has_bytes(kind: Any) -> bool:
    if any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)):
        return True
    if getattr(types, "is_binary_view", types.is_binary)(kind):
        return True
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _has_bytes(kind.storage_type)
    if types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _microseconds(kind: Any) -> Any:
    """The type with its nanoseconds made microseconds: Python's own types end there."""
    if getattr(kind, "unit", "") == "ns":
        if types.is_timestamp(kind):
            return pyarrow.timestamp("us", kind.tz)
        return pyarrow.time64("us") if types.is_time64(kind) else pyarrow.duration("us")
    if types.is_list(kind) or types.is_large_list(kind):
        made = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return made(kind.value_field.with_type(_microseconds(kind.value_type)))
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(_microseconds(field.type)) for field in fields])
    return kind
