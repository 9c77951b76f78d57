"""What each sample of a bucket must hold, by its manifest.

Legend: C latent channels, h and w sides of the latent, L tokens of a caption, D width of its embedding, P width of a
pooled vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from numpy.typing import NDArray

from pipeline.data.manifest import Bucket, Fingerprint, Manifest
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
class TextArray:
    """One of the arrays that are stored of each caption, in KEY.{kind}{number}.{tower}.npy."""

    kind: Literal["tokens", "text", "pooled"]
    tower: str
    array: ArrayLayout


def text_arrays(mark: Fingerprint) -> tuple[TextArray, ...]:
    """What is stored of each caption: tokens [L], or text [L, D] and perhaps pooled [P], tower by tower."""
    found: list[TextArray] = []
    for tower in mark.text_towers:
        if mark.text_mode != "cached":
            found.append(TextArray("tokens", tower.name, ArrayLayout("uint16", (tower.context_length,))))
            continue
        states = ArrayLayout("float16", (tower.context_length, tower.width), mark.text_padding == "trimmed")
        found.append(TextArray("text", tower.name, states))
        if tower.pooled_width:
            found.append(TextArray("pooled", tower.name, ArrayLayout("float16", (tower.pooled_width,))))
    return tuple(found)


@dataclass(frozen=True)
class Layout:
    """What each sample of a bucket must hold; make it with `of`."""

    moments: tuple[int, int, int]  # 2C, h, w
    flip: bool  # mirrored latents are there, and wanted
    text: tuple[TextArray, ...]  # of each caption

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
        return cls(manifest.latent_shape(bucket), flip and mark.flip, text_arrays(mark))

    @cached_property
    def columns(self) -> dict[str, int]:
        """Column of each member by what follows its key: MOMENTS, SIZE, JSON, MIRRORED, then caption by caption `text`.

        -1 for members that are passed over.
        """
        fixed = {"latent.npy": MOMENTS, "size.npy": SIZE, "json": JSON}
        fixed["latent_flip.npy"] = MIRRORED if self.flip else -1
        texts = (f"{one.kind}{number}.{one.tower}.npy" for number in range(MAX_CAPTIONS) for one in self.text)
        return fixed | {name: FIXED_COLUMNS + column for column, name in enumerate(texts)}

    @cached_property
    def fixed(self) -> dict[int, ArrayLayout]:
        """The arrays that a sample has once, by column."""
        latent = ArrayLayout("float16", self.moments)
        arrays = {MOMENTS: latent, SIZE: ArrayLayout("int32", (6,))}
        return arrays | ({MIRRORED: latent} if self.flip else {})
