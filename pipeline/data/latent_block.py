"""One block of a latent shard: its bytes checked, and where in them each sample's arrays are. Nothing is copied."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib

from pipeline.data.layout import FIXED_COLUMNS, JSON, MIRRORED, ArrayLayout, Layout
from pipeline.data.order import Integers
from pipeline.data.sample_table import find_samples
from pipeline.data.samples import split_name
from pipeline.data.shard_plan import ShardPlan
from pipeline.data.tar import read_npy
from pipeline.data.tar_header import BLOCK
from pipeline.errors import DataError

_AGAIN = (
    "run `lathe verify` on the manifest; if it finds the shard damaged too, delete the shard and its receipt, and run"
    " `lathe encode` again"
)


@dataclass(frozen=True)
class LatentBlock:
    """The samples of one block; `parse_block` makes it.

    Where things are stands in flat lists, `width` columns a sample (see `Layout.columns`): lists give numbers quickest.
    """

    data: memoryview
    keys: list[str]
    width: int
    starts: list[int]  # of each array's numbers in `data`; -1 where the sample has no such caption, or none is mirrored
    tokens: list[int] | None  # of each trimmed embedding; None where nothing is trimmed
    counts: list[int]  # captions of each sample
    about: list[tuple[int, int]]  # of each KEY.json, its first byte and its end
    where: str

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def mirrored(self) -> bool:
        """Whether there are mirrored latents."""
        return self.starts[MIRRORED] >= 0

    def captions(self, row: int) -> int:
        """Number of captions of a sample, at least 1."""
        return self.counts[row]

    def caption_texts(self, row: int) -> list[str]:
        """The captions of a sample. Raises DataError where its JSON does not tell them."""
        start, end = self.about[row]
        try:
            captions = json.loads(bytes(self.data[start:end]))["captions"]
        except (ValueError, KeyError, TypeError, RecursionError):
            captions = None
        if not isinstance(captions, list) or len(captions) != self.counts[row]:
            said = f"the JSON of {self.keys[row]!r} does not tell its {self.counts[row]} captions"
            raise DataError(f"{self.where}: {said}", _AGAIN)
        return [str(caption) for caption in captions]


def parse_block(data: bytes | memoryview, plan: ShardPlan, block: int, layout: Layout, where: str) -> LatentBlock:
    """`check_block` and `index_block`: the arguments and errors are theirs."""
    check_block(data, plan, block, where)
    return index_block(data, plan, block, layout, where)


def check_block(data: bytes | memoryview, plan: ShardPlan, block: int, where: str) -> None:
    """Check that a block's bytes are those that were written.

    Args:
        data: its bytes.
        plan: of the shard.
        block: its number in the plan.
        where: the shard's address, for messages.

    Raises:
        DataError: bytes are missing or changed.
    """
    place, length = f"{where}: {plan.place(block)}", int(plan.length[block])
    if len(data) != length:
        raise DataError(f"{place}: the shard ends after {len(data)} of these {length} bytes", _AGAIN)
    if isal_zlib.crc32(data) != plan.crc32[block]:
        raise DataError(f"{place} are damaged: the checksum is not the receipt's", _AGAIN)


def index_block(data: bytes | memoryview, plan: ShardPlan, block: int, layout: Layout, where: str) -> LatentBlock:
    """Find the samples of a block.

    Args:
        data: its bytes, which are as they were written. They are kept, not copied.
        plan: of the shard.
        block: its number in the plan.
        layout: what each sample must hold.
        where: the shard's address, for messages.

    Raises:
        DataError: a member is not what the manifest says.
    """
    place = f"{where}: {plan.place(block)}"
    try:
        return _Parser(memoryview(data).cast("B"), layout).block(int(plan.samples[block]), place)
    except DataError as error:
        raise DataError(f"{place}: {error.message}", _AGAIN) from error


class _Parser:
    """Finds the samples of one block.

    Raises:
        DataError: the tar is damaged, or a sample is not what the layout says.
    """

    def __init__(self, data: memoryview, layout: Layout) -> None:
        self._data, self._layout = data, layout

    def block(self, samples: int, where: str) -> LatentBlock:
        """The block, which must have so many samples."""
        self._found = find_samples(self._data, self._layout, samples)
        self._begins, self._sizes, table = self._found.begins, self._found.sizes, self._found.table
        if len(self._found.keys) != samples:
            raise DataError(f"{len(self._found.keys)} samples in place of {samples}")
        counts = self._captions(table)
        starts = np.full(table.shape, -1, np.int64)
        tokens = np.zeros(table.shape, np.int64)
        for column, array in self._layout.fixed.items():
            starts[:, column] = self._arrays(table[:, column], array)[0]
        kinds = len(self._layout.text)
        for kind, one in enumerate(self._layout.text):
            columns = slice(FIXED_COLUMNS + kind, None, kinds)
            there = table[:, columns] >= 0
            found = self._arrays(table[:, columns][there], one.array)
            starts[:, columns][there], tokens[:, columns][there] = found
        about = table[:, JSON]
        ends = self._begins[about] + self._sizes[about]
        trimmed = any(one.array.trimmed for one in self._layout.text)
        return LatentBlock(
            data=self._data,
            keys=self._found.keys,
            width=table.shape[1],
            starts=starts.ravel().tolist(),
            tokens=tokens.ravel().tolist() if trimmed else None,
            counts=counts,
            about=list(zip(self._begins[about].tolist(), ends.tolist(), strict=True)),
            where=where,
        )

    def _captions(self, table: Integers) -> list[int]:
        """Captions of each sample. Raises DataError where one is not whole."""
        there = table >= 0
        fixed = there[:, [*self._layout.fixed, JSON]].all(1)
        text = there[:, FIXED_COLUMNS:]
        counts: Integers = text.sum(1)
        # As many places are taken as the first ones: no gaps, and whole captions only.
        whole = fixed & (counts > 0) & (counts % len(self._layout.text) == 0)
        whole &= (text == (np.arange(text.shape[1]) < counts[:, None])).all(1)
        if not whole.all():
            key = self._found.keys[int(whole.argmin())]
            parts = sorted(extension for own, extension in map(split_name, self._found.names()) if own == key)
            raise DataError(f"sample {key!r} is not whole: it has only {', '.join(parts)}")
        captions: list[int] = (counts // len(self._layout.text)).tolist()
        return captions

    def _arrays(self, members: Integers, array: ArrayLayout) -> tuple[Integers, Integers]:
        """Where the numbers of these members' arrays begin, and their first sides. Raises DataError."""
        begins, sizes = self._begins[members], self._sizes[members]
        header, side = self._read(int(members[0]), array)
        if self._alike(begins, sizes, header):
            return begins + len(header), np.full(len(members), side)
        known: dict[tuple[bytes, int], tuple[bytes, int]] = {}
        found = []
        for member, begin, size in zip(members.tolist(), begins.tolist(), sizes.tolist(), strict=True):
            seen = bytes(self._data[begin : begin + len(header)]), size
            if seen not in known:
                known[seen] = self._read(member, array)
            found.append((begin + len(known[seen][0]), known[seen][1]))
        starts, sides = np.array(found, np.int64).T
        return starts, sides

    def _alike(self, begins: Integers, sizes: Integers, header: bytes) -> bool:
        """Whether all members are of one size and begin with this header."""
        count = len(self._data) // BLOCK
        if len(header) > BLOCK or begins.max() // BLOCK >= count or (sizes != sizes[0]).any():
            return False
        records = np.frombuffer(self._data, np.uint8, count * BLOCK).reshape(count, BLOCK)[:, : len(header)]
        return bool((records[begins // BLOCK] == np.frombuffer(header, np.uint8)).all())

    def _read(self, member: int, array: ArrayLayout) -> tuple[bytes, int]:
        """Header and first side of a member's array, which must be as the layout says."""
        begin, size = int(self._begins[member]), int(self._sizes[member])
        found = read_npy(self._data[begin : begin + size])
        if not array.fits(found):
            key, _ = split_name(self._found.names()[member])
            order = "" if found.flags.c_contiguous else " in Fortran order"
            raise DataError(
                f"sample {key!r} holds {found.dtype} {list(found.shape)}{order} where the manifest says {array}"
            )
        return bytes(self._data[begin : begin + size - found.nbytes]), found.shape[0]
