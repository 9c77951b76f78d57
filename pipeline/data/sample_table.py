"""The members of a block by sample: what each one has, and where.

Nearly all blocks hold the same members of each sample in the same order, under keys that are equally long. Then a look
at the first sample, and a comparison of all names at once, tells what reading names one by one would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.data.layout import FIXED_COLUMNS, Layout
from pipeline.data.order import Integers
from pipeline.data.samples import split_name
from pipeline.data.tar_index import find_members, plain_members, plain_names
from pipeline.errors import DataError

_UNDERSCORE, _DOT, _SLASH = b"_./"


@dataclass(frozen=True)
class SampleTable:
    """n samples with m members."""

    keys: list[str]  # [n]
    table: Integers  # [n, width] number of each member by sample and column, see `Layout.columns`; -1 = there is none
    begins: Integers  # [m] first byte of each member's content
    sizes: Integers  # [m] bytes of each content
    names: Callable[[], list[str]]  # [m]


def find_samples(data: memoryview, layout: Layout, samples: int) -> SampleTable:
    """The samples of a block whose bytes are known to be those that were written.

    Args:
        data: the block.
        layout: what each sample must hold.
        samples: how many there should be; not enforced.

    Raises:
        DataError: the tar is damaged, or a member is there twice.
    """
    return _by_pattern(data, layout, samples) or _one_by_one(data, layout)


def _by_pattern(data: memoryview, layout: Layout, samples: int) -> SampleTable | None:
    """The samples where all have the same members; None where they are not so, or it cannot be told so quickly."""
    found = plain_members(data)
    if found is None or not samples or len(found.starts) % samples:
        return None
    each = len(found.starts) // samples
    first = plain_names(found.names[:each])
    parts = [split_name(name) for name in first or [""]]
    key = parts[0][0].encode("utf-8", "surrogateescape")
    columns = [layout.columns.get(extension, -1) for _, extension in parts]
    places = [column for column in columns if column >= 0]
    if not key or any(own != parts[0][0] for own, _ in parts) or len(set(places)) < len(places):
        return None
    names = found.names.reshape(samples, each, -1)
    keys, endings = names[:, 0, : len(key)], names[0, :, len(key) :]
    # What could end a key elsewhere in another sample, or make it one that is passed over.
    odd = (keys == 0) | (keys == _DOT)
    if odd.any() or (keys[:, -1] == _SLASH).any() or (keys[:, 0] == _UNDERSCORE).any():
        return None
    if (names[:, :, : len(key)] != keys[:, None]).any() or (names[:, :, len(key) :] != endings).any():
        return None
    if (keys[1:] == keys[:-1]).all(1).any():
        return None
    joined = b"\0".join(np.ascontiguousarray(keys).view(f"S{len(key)}")[:, 0].tolist())
    table = np.full((samples, _width(places, layout)), -1, np.int64)
    table[:, places] = np.arange(0, samples * each, each)[:, None] + np.flatnonzero(np.array(columns) >= 0)
    return SampleTable(
        keys=joined.decode("utf-8", "surrogateescape").split("\0"),
        table=table,
        begins=found.starts,
        sizes=found.sizes,
        names=lambda: plain_names(found.names) or [],
    )


def _one_by_one(data: memoryview, layout: Layout) -> SampleTable:
    """The samples of any tar."""
    names, begins, sizes = find_members(data)
    columns, keys, rows, places, numbers = layout.columns, list[str](), list[int](), list[int](), list[int]()
    prefix = ""
    for number, name in enumerate(names):
        column = columns.get(name[len(prefix) :]) if keys and name.startswith(prefix) else None
        if column is None:
            key, extension = split_name(name)
            if not key:
                continue
            if not keys or key != keys[-1]:
                keys.append(key)
                prefix = f"{key}."
            column = columns.get(extension, -1)
        if column >= 0:
            rows.append(len(keys) - 1)
            places.append(column)
            numbers.append(number)
    table = np.full((len(keys), _width(places, layout)), -1, np.int64)
    table[rows, places] = numbers
    if np.count_nonzero(table >= 0) < len(numbers):
        lost = sorted(set(numbers) - set(table[table >= 0].tolist()))
        raise DataError(f"{names[lost[0]]!r} is there twice")
    return SampleTable(keys, table, begins, sizes, lambda: names)


def _width(places: list[int], layout: Layout) -> int:
    """Columns of a table: those of at least one caption."""
    kinds = len(layout.text)
    captions = -(-(max(places, default=0) + 1 - FIXED_COLUMNS) // kinds)
    return FIXED_COLUMNS + max(captions, 1) * kinds
