"""A hash of numbers that is ours, so that no other package's next version changes the order of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

_BITS = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS, _LAST_SHIFT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def hash64(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits for each element of the broadcast parts: a chain of splitmix64 (Steele et al. 2014, fig. 14)."""
    known = [int(part) for part in takewhile(lambda part: isinstance(part, int), parts)]
    state = np.array([_chained(known)], np.uint64)
    for part in parts[len(known) :]:
        word = np.atleast_1d(np.asarray(part % 2**64 if isinstance(part, int) else part).astype(np.uint64))
        state = (state ^ word) + np.uint64(_GAMMA)
        for shift, factor in _ROUNDS:
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state = state ^ (state >> np.uint64(_LAST_SHIFT))
    return state


def _chained(words: Sequence[int]) -> int:
    """The same of single numbers: an array of one element takes ten times as long."""
    state = 0
    for word in words:
        state = ((state ^ word & _BITS) + _GAMMA) & _BITS
        for shift, factor in _ROUNDS:
            state = (state ^ state >> shift) * factor & _BITS
        state ^= state >> _LAST_SHIFT
    return state
