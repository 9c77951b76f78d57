"""The numbers of a log by key, a million lines in bounded memory; drawn from few points that hide nothing."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, ...]
"""A metric's key, then the values of its labels: ("validation_loss", "main")."""

_DEEPEST = 4
_MOST_SERIES = 2000
LARGEST_STEP = 1 << 53
_LARGEST_INTEGER = 1 << 1000  # that a float has


@dataclass(frozen=True)
class Series:
    """One number over the lines of a log that have it. A value that was not finite is NaN."""

    key: Key
    steps: NDArray[np.int64]
    times: NDArray[np.float64]  # Unix; NaN = the line does not tell
    values: NDArray[np.float64]

    @property
    def finite(self) -> NDArray[np.float64]:
        """The values that are numbers."""
        return self.values[np.isfinite(self.values)]

    @property
    def last(self) -> float:
        """The last value, finite or not."""
        return float(self.values[-1])


@dataclass(frozen=True)
class Points:
    """A series in few points, each of so many lines: their mean, their least and their greatest. NaN = none finite."""

    steps: NDArray[np.int64]  # of the last line of each point
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    lines_per_point: float
    not_finite: NDArray[np.int64]  # steps of points that have values which are no numbers


class Numbers:
    """What a log says, line by line. A step that is before the one last told begins that part of the log anew."""

    def __init__(self) -> None:
        self._steps, self._times = array("q"), array("d")
        self._lines: dict[Key, array[int]] = {}
        self._values: dict[Key, array[float]] = {}
        self.superseded = 0
        """Lines that were told again, as of a run that went on from an older checkpoint."""
        self.ignored = 0
        """Values that are no numbers of a metric, or of too many."""

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of the log."""
        step = line["step"]
        if not -1 <= step < LARGEST_STEP:
            self.ignored += 1
            return
        if self._steps and step < self._steps[-1]:
            self._drop_from(step)
        number = len(self._steps)
        self._steps.append(step)
        moment = line.get("time")
        self._times.append(moment if isinstance(moment, float | int) and abs(moment) < LARGEST_STEP else math.nan)
        for key, value in self._flat(line, ()):
            if key not in self._lines:
                if len(self._lines) >= _MOST_SERIES:
                    self.ignored += 1
                    continue
                self._lines[key], self._values[key] = array("I"), array("d")
            self._lines[key].append(number)
            self._values[key].append(value)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """Of the last line."""
        return self._steps[-1] if self._steps else None

    @property
    def times(self) -> NDArray[np.float64]:
        """Unix times of all lines; NaN where a line has none."""
        return np.array(self._times)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Steps of all lines."""
        return np.array(self._steps, np.int64)

    def tail(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and times of the last lines."""
        return np.array(self._steps[-count:], np.int64), np.array(self._times[-count:])

    def pace(self, after: int) -> float | None:
        """Seconds that a step took in the lines after a step, whatever came between them; None = not known."""
        first, last = bisect_right(self._steps, after), len(self._steps) - 1
        while first < last and math.isnan(self._times[first]):
            first += 1
        while first < last and math.isnan(self._times[last]):
            last -= 1
        if first >= last:
            return None
        steps, seconds = self._steps[last] - self._steps[first], self._times[last] - self._times[first]
        return seconds / steps if steps > 0 and seconds > 0 else None

    def named(self, metric: str = "") -> list[Key]:
        """The keys that there are, of one metric or of all, in order of appearance."""
        return [key for key, values in self._values.items() if values and (not metric or key[0] == metric)]

    def get(self, *key: str) -> Series | None:
        """One number over time; None where no line has it."""
        if not self._values.get(key):
            return None
        lines = np.array(self._lines[key])
        steps, times = np.frombuffer(self._steps, np.int64)[lines], np.frombuffer(self._times)[lines]
        return Series(key, steps, times, np.array(self._values[key]))

    def last(self, *key: str) -> float | None:
        """The last value; None where there is none, or none that is finite."""
        values = self._values.get(key)
        return values[-1] if values and math.isfinite(values[-1]) else None

    def _flat(self, tree: Mapping[str, Any], above: Key) -> Iterator[tuple[Key, float]]:
        for name, value in tree.items():
            key = (*above, name)
            if key in (("step",), ("time",)):
                continue
            if value is None:
                yield key, math.nan
            elif isinstance(value, Mapping) and len(key) < _DEEPEST:
                yield from self._flat(value, key)
            elif isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST_INTEGER):
                yield key, float(value)
            else:
                self.ignored += 1

    def _drop_from(self, step: int) -> None:
        keep = bisect_left(self._steps, step)
        self.superseded += len(self._steps) - keep
        del self._steps[keep:], self._times[keep:]
        for key, lines in self._lines.items():
            kept = bisect_left(lines, keep)
            del lines[kept:], self._values[key][kept:]


def passed(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds since the first of some times, pauses included; a clock that was set back takes nothing away."""
    since: NDArray[np.float64] = np.maximum(np.diff(times, prepend=times[:1]), 0).cumsum()
    return since


def thinned(series: Series, most: int) -> Points:
    """A series in at most `most` points: each line one where they are few, else runs of lines of equal length."""
    count = len(series.values)
    borders = np.unique(np.linspace(0, count, min(most, count) + 1).astype(np.int64))
    first, last = borders[:-1], borders[1:] - 1
    finite = np.isfinite(series.values)
    counts = np.add.reduceat(finite, first, dtype=np.int64)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(np.where(finite, series.values, 0.0), first) / np.where(counts, counts, 1)
    low = np.minimum.reduceat(np.where(finite, series.values, np.inf), first)
    high = np.maximum.reduceat(np.where(finite, series.values, -np.inf), first)
    empty = counts == 0
    broken = counts < last - first + 1
    steps = series.steps[last]
    nothing = np.where(empty, np.nan, 0.0)
    return Points(steps, mean + nothing, _or_nan(low), _or_nan(high), count / len(first), steps[broken])


def _or_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)
