"""What each sample of a bucket must hold, by its manifest.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding, P width of a
pooled vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from pipeline.data.manifest import Bucket, Manifest, Tower
from pipeline.data.samples import MAX_CAPTIONS
from pipeline.errors import DataError

MOMENTS, SIZE, JSON, MIRRORED = range(4)  # columns of a block's table, see `Layout.columns`
FIXED_COLUMNS = 4
_MODES = ("joint", "online", "cached")


@dataclass(frozen=True)
class ArrayLayout:
    """What one array must be."""

    dtype: str
    shape: tuple[int, ...]
    trimmed: bool = False  # the first side may be shorter, down to 1

    def fits(self, found: NDArray[Any]) -> bool:
        """Whether an array is so, with its numbers in C order."""
        sides, own = found.shape, self.shape
        as_told = sides == own or (
            self.trimmed and len(sides) == len(own) and sides[1:] == own[1:] and 1 <= sides[0] <= own[0]
        )
        return as_told and found.dtype == self.dtype and found.flags.c_contiguous

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}{' or fewer tokens' if self.trimmed else ''}"


@dataclass(frozen=True)
class TowerLayout:
    """What is stored of a caption for one text tower."""

    name: str
    cached: bool  # embeddings; else token ids
    context_length: int  # L
    width: int  # D; 0 for token ids
    pooled_width: int  # P; 0 = none
    trimmed: bool  # padding is not stored

    def arrays(self) -> Iterator[tuple[str, ArrayLayout]]:
        """The kinds that stand before the caption's number, and their arrays."""
        if not self.cached:
            yield "tokens", ArrayLayout("uint16", (self.context_length,))
            return
        yield "text", ArrayLayout("float16", (self.context_length, self.width), self.trimmed)
        if self.pooled_width:
            yield "pooled", ArrayLayout("float16", (self.pooled_width,))


@dataclass(frozen=True)
class Layout:
    """What each sample of a bucket must hold; make it with `of`."""

    moments: tuple[int, int, int]  # 2C, h, w
    flip: bool  # mirrored latents are there, and wanted
    towers: tuple[TowerLayout, ...]

    @classmethod
    def of(cls, manifest: Manifest, bucket: Bucket, flip: bool = True) -> Layout:
        """The layout of a data set's bucket.

        Args:
            manifest: of the data set.
            bucket: height and width in pixels.
            flip: take the mirrored latents where the data set has them.

        Raises:
            DataError: the captions are stored in a way that this Lathe does not know.
        """
        mark = manifest.fingerprint
        if mark.text_mode not in _MODES:
            raise DataError(
                f"the latents' captions are stored for text.mode={mark.text_mode}, which this Lathe does not know",
                "install a newer lathe-ldm",
            )
        cached, trimmed = mark.text_mode == "cached", mark.text_padding == "trimmed"
        towers = tuple(_tower(tower, cached=cached, trimmed=trimmed) for tower in mark.text_towers)
        return cls(manifest.latent_shape(bucket), flip and mark.flip, towers)

    @cached_property
    def text(self) -> tuple[tuple[str, str, ArrayLayout], ...]:
        """Kind, tower and array of each column of one caption."""
        return tuple((kind, tower.name, array) for tower in self.towers for kind, array in tower.arrays())

    @cached_property
    def columns(self) -> dict[str, int]:
        """Column of each member by what follows its key: MOMENTS, SIZE, JSON, MIRRORED, then caption by caption `text`.

        -1 for members that are passed over.
        """
        fixed = {"latent.npy": MOMENTS, "size.npy": SIZE, "json": JSON}
        fixed["latent_flip.npy"] = MIRRORED if self.flip else -1
        texts = (f"{kind}{number}.{tower}.npy" for number in range(MAX_CAPTIONS) for kind, tower, _ in self.text)
        return fixed | {name: FIXED_COLUMNS + column for column, name in enumerate(texts)}

    @cached_property
    def fixed(self) -> dict[int, ArrayLayout]:
        """The arrays that a sample has once, by column."""
        latent = ArrayLayout("float16", self.moments)
        arrays = {MOMENTS: latent, SIZE: ArrayLayout("int32", (6,))}
        return arrays | ({MIRRORED: latent} if self.flip else {})


def _tower(tower: Tower, *, cached: bool, trimmed: bool) -> TowerLayout:
    return TowerLayout(
        name=tower.name,
        cached=cached,
        context_length=tower.context_length,
        width=tower.width if cached else 0,
        pooled_width=tower.pooled_width if cached else 0,
        trimmed=cached and trimmed,
    )
