"""Pictures to numbers: reconstruction error, prompt retrieval, colour and shape. Pure, numpy only.

Legend: N pictures of H x W pixels in sRGB, uint8 in 0 to 255 or floats in 0 to 1; every score is per picture, [N].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8] | NDArray[np.floating[Any]]
Scores = NDArray[np.float64]
Mask = NDArray[np.bool_]

WHITE_FROM = 240 / 255
"""A pixel counts as white where all its channels reach this: decoders leave a background not quite white."""

_CHUNK_ELEMENTS = 1 << 22  # of targets compared at once: 32 MiB in float64

# IEC 61966-2-1: linear sRGB to CIE XYZ, rows X Y Z; a white pixel gives the D65 white point
_SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def psnr(pictures: Pictures, references: Pictures) -> Scores:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE) with values in 0 to 1; infinite for equal pictures.

    Args:
        pictures: [N, H, W, 3].
        references: as pictures; the two may differ in dtype.

    Raises:
        ValueError: shapes differ.
    """
    return psnr_where(pictures, references, np.ones(references.shape[:3], np.bool_))


def psnr_where(pictures: Pictures, references: Pictures, mask: Mask) -> Scores:
    """`psnr` over the pixels where mask [N, H, W] is true, such as `non_white(references)`; NaN where it never is."""
    a, b = _unit(pictures), _unit(references)
    if a.shape != b.shape:
        raise ValueError(f"pictures {a.shape} and references {b.shape} differ in shape")
    error = np.square(a - b).mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(-10 * np.log10((error * mask).sum((1, 2)) / mask.sum((1, 2))))


def non_white(pictures: Pictures) -> Mask:
    """The pixels that belong to the object on a white background: [N, H, W] of pictures [N, H, W, 3]."""
    return np.asarray((_unit(pictures) < WHITE_FROM).any(-1))


def retrieval_ranks(
    queries: NDArray[np.floating[Any]], targets: NDArray[np.floating[Any]], own_index: NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """Each query's own target's place among all targets by Euclidean distance, [N]; 1 = nearest.

    Targets exactly as near as a query's own (doubles of it) do not count against it. Where query or own target is not
    finite, the place is M + 1.

    Args:
        queries: [N, D], such as generated latents, flattened.
        targets: [M, D], such as the latents of all training pictures.
        own_index: [N], each query's own target.
    """
    nearer = [_nearer(q.astype(np.float64), targets, int(i)) for q, i in zip(queries, own_index, strict=True)]
    return np.array(nearer, np.int64) + 1


def share_within(ranks: NDArray[np.int64], k: int) -> float:
    """Top-k retrieval: the share of ranks up to k, 0 to 1. By chance it is k / M."""
    return float((ranks <= k).mean())


def colour_score(pictures: Pictures, truths: Pictures) -> Scores:
    """Distance of the mean colours of the non-white pixels: CIE 1976 delta E in CIELAB (D65).

    0 is equal, about 2.3 just noticeable, 100 black against white; the largest in sRGB is about 260. A picture without
    non-white pixels counts as white. Arguments are [N, H, W, 3]; the sides H and W of the two may differ.
    """
    return np.asarray(np.linalg.norm(_mean_colour(pictures) - _mean_colour(truths), axis=-1))


def shape_score(pictures: Pictures, truths: Pictures) -> Scores:
    """Overlap of the non-white areas, intersection over union: 0 disjoint, 1 equal; two white pictures give 1.

    Arguments are [N, H, W, 3], of equal shape.
    """
    a, b = non_white(pictures), non_white(truths)
    union = (a | b).sum((1, 2))
    return np.where(union > 0, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)


def srgb_to_lab(colours: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """sRGB in 0 to 1, [..., 3], to CIELAB: L* 0 to 100, a* and b* about -110 to 110 (CIE 15:2004, 8.2.1)."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((np.maximum(colours, 0) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _SRGB_TO_XYZ.T / _SRGB_TO_XYZ.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _nearer(query: NDArray[np.float64], targets: NDArray[np.floating[Any]], own: int) -> int:
    """Number of targets strictly nearer to the query than its own; all, where that distance is not finite."""
    own_distance = np.square(targets[own].astype(np.float64) - query).sum()
    if not np.isfinite(own_distance):
        return len(targets)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, targets.shape[1]))
    nearer = 0
    for first in range(0, len(targets), chunk):
        # differences, not the expanded square: its rounding would part doubles
        distances = np.square(targets[first : first + chunk].astype(np.float64) - query).sum(1)
        nearer += int((distances < own_distance).sum())
    return nearer


def _mean_colour(pictures: Pictures) -> NDArray[np.float64]:
    """CIELAB [N, 3]: the mean over each picture's non-white pixels, or white."""
    mask = non_white(pictures)[..., None]
    count = mask.sum((1, 2))
    total = (srgb_to_lab(_unit(pictures)) * mask).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), [100.0, 0.0, 0.0])


def _unit(pictures: Pictures) -> NDArray[np.float64]:
    """To float64 in 0 to 1."""
    values = pictures.astype(np.float64)
    return values / 255 if pictures.dtype == np.uint8 else values
