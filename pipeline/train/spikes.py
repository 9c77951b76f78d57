"""Values far beyond what is usual of late: a loss, a gradient norm."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW, _LEAST = 100, 20  # values looked back upon; fewer than the second say nothing
_DEVIATIONS = 8.0  # of robust standard deviations above the median
_PER_MAD = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST_RATIO = 0.02  # of the median: so much is never a spike's whole deviation, however still it was before


class Spikes:
    """Judges values of one kind, one after the other, by the median and the spread of those before."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, value: float) -> float | None:
        """What is usual, where the value is a spike: the median of those before. None where it is none.

        Values that are not finite are passed over: they are counted as skipped steps.
        """
        if not math.isfinite(value):
            return None
        usual = self._usual(value)
        self._before.append(value)
        return usual

    def _usual(self, value: float) -> float | None:
        if len(self._before) < _LEAST:
            return None
        middle = median(self._before)
        spread = _PER_MAD * median(abs(each - middle) for each in self._before)
        spread = max(spread, _LEAST_RATIO * abs(middle))
        return middle if value > middle + _DEVIATIONS * spread else None
