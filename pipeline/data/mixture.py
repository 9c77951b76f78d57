"""Several data sets in one run: how many of the samples that are drawn come from each. Pure, in exact fractions.

Legend: B global batch, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from pipeline.data.manifest import Bucket
from pipeline.data.order import Group
from pipeline.errors import ConfigError


def check_weights(weights: Sequence[float | None]) -> None:
    """Raises ConfigError where some data sets have a weight, and others none."""
    missing = [number for number, weight in enumerate(weights) if weight is None]
    if missing and len(missing) < len(weights):
        raise ConfigError(
            f"datasets.{missing[0]}.weight is not given, and other data sets have one",
            "give all data sets a weight, or none: then each is drawn from as often as it has samples",
        )


def proportions(weights: Sequence[float | None], samples: Sequence[int]) -> tuple[Fraction, ...]:
    """Each data set's part of the samples that are drawn; together 1.

    Args:
        weights: of each data set, read as decimals: 0.1 is a tenth.
        samples: of each data set; stands in for a weight that is None.
    """
    parts = [Fraction(n) if w is None else Fraction(str(float(w))) for w, n in zip(weights, samples, strict=True)]
    total = sum(parts)
    return tuple(part / total for part in parts)


def group_by_steps(parts: Sequence[Fraction], global_batch: int) -> tuple[Group, ...]:
    """Each step takes one stream; `parts` are the streams' parts of the samples that are drawn."""
    return tuple(Group((stream,), (global_batch,), weight) for stream, weight in enumerate(_integers(parts)))


def group_by_batches(parts: Sequence[Fraction], buckets: Sequence[Bucket], global_batch: int) -> tuple[Group, ...]:
    """Each step takes one bucket, and of all streams of this bucket a constant number of samples.

    Args:
        parts: the streams' parts of the samples that are drawn.
        buckets: theirs.
        global_batch: samples per step over all ranks.

    Raises:
        ConfigError: more data sets have pictures of one size than a batch has places.
    """
    members: dict[Bucket, list[int]] = {}
    for stream, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(stream)
    for (height, width), streams in members.items():
        if len(streams) > global_batch:
            raise ConfigError(
                f"global_batch: {global_batch} places cannot be shared by the {len(streams)} data sets that have"
                f" pictures of {height}x{width}",
                "raise global_batch, or set loader.mixing=steps",
            )
    ordered = [members[bucket] for bucket in sorted(members)]
    weights = _integers([sum((parts[s] for s in streams), Fraction()) for streams in ordered])
    return tuple(
        Group(tuple(streams), quotas([parts[s] for s in streams], global_batch), weight)
        for streams, weight in zip(ordered, weights, strict=True)
    )


def quotas(parts: Sequence[Fraction], places: int) -> tuple[int, ...]:
    """Places in proportion to `parts`, by largest remainder and at least one for each; of equal ones the first gains.

    Needs at least as many places as there are parts.
    """
    total = sum(parts)
    exact = [places * part / total for part in parts]
    given = [max(1, math.floor(share)) for share in exact]
    everyone = range(len(parts))
    while sum(given) < places:
        given[max(everyone, key=lambda i: (exact[i] - given[i], -i))] += 1
    while sum(given) > places:
        given[max((i for i in everyone if given[i] > 1), key=lambda i: (given[i] - exact[i], i))] -= 1
    return tuple(given)


def mean_and_std(
    parts: Sequence[Fraction], means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [C] of the data sets' mixture, by the law of total variance.

    Args:
        parts: of the samples that are drawn; together 1.
        means: of each data set, [C].
        stds: of each data set, [C].
    """
    if len(parts) == 1:
        return tuple(means[0]), tuple(stds[0])
    p = [float(part) for part in parts]
    mean = tuple(math.fsum(map(math.prod, zip(p, column, strict=True))) for column in zip(*means, strict=True))
    std = tuple(
        math.sqrt(math.fsum(q * (s * s + (m - centre) ** 2) for q, m, s in zip(p, ms, ss, strict=True)))
        for ms, ss, centre in zip(zip(*means, strict=True), zip(*stds, strict=True), mean, strict=True)
    )
    return mean, std


def _integers(parts: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportion, the smallest there are."""
    common = math.lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]
