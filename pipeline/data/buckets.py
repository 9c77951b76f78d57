"""Aspect-ratio buckets: the few sizes that pictures of every shape are brought to (NovelAI 2022; Podell et al. 2023).

A bucket is (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import BucketsConfig
from pipeline.data.manifest import Bucket
from pipeline.errors import ConfigError


def bucket_sizes(resolution: int, config: BucketsConfig | None) -> tuple[Bucket, ...]:
    """The buckets of a resolution, sorted.

    Args:
        resolution: root of the greatest number of pixels, or the side of the square.
        config: None gives the square alone.

    Returns:
        Sizes with sides that are multiples of the step, neither of which could be a step longer within resolution x
        resolution pixels, and the longer at most `max_aspect` times the shorter. With each size its transpose; the
        square among them when the step divides it.

    Raises:
        ConfigError: no size is left.
    """
    if config is None:
        return ((resolution, resolution),)
    pixels, step = resolution * resolution, config.step

    def longest(side: int) -> int:
        return pixels // side // step * step

    # h * w <= resolution^2 and h <= max_aspect * w: h <= sqrt(max_aspect) * resolution, and so no taller than this.
    heights = range(step, int(resolution * config.max_aspect) + 1, step)
    sizes = [(height, width) for height in heights if (width := longest(height)) and longest(width) == height]
    buckets = tuple(size for size in sizes if max(size) <= config.max_aspect * min(size))
    if not buckets:
        raise ConfigError(
            f"images.buckets: no size of at most {resolution} x {resolution} pixels has sides that are multiples of"
            f" {step} and an aspect of at most {config.max_aspect:g}",
            "raise images.buckets.max_aspect, or set images.resolution to a multiple of images.buckets.step",
        )
    return buckets


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect is nearest on a logarithmic scale; of equally near ones the largest, then the first."""

    def distance(bucket: Bucket) -> tuple[float, int, Bucket]:
        across, along = height * bucket[1], width * bucket[0]
        # exp(|log aspect difference|): one division of whole numbers, the same on every machine, as log is not.
        return max(across, along) / min(across, along), -bucket[0] * bucket[1], bucket

    return min(buckets, key=distance)


def scale(height: int, width: int, bucket: Bucket) -> float:
    """By how much a picture is scaled to cover the bucket; above 1 it grows."""
    return max(bucket[0] / height, bucket[1] / width)
