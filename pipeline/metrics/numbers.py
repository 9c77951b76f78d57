"""The numbers of one process as the table has them, in the form that Prometheus collects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pipeline.console import printable
from pipeline.metrics.table import DEFINITIONS, Definition, Job, Scope, Subject, Value, flat

MOST_SERIES = 256
"""Of one metric: whatever label values data may bring, those that come later are told together as `other`."""
OTHER = "other"
_LONGEST_LABEL = 128

Traffic = Callable[[], Mapping[str, Value]]
"""What this process asked of its stores, by the table's keys, see `pipeline.storage.counters`."""
_Values = Mapping[str, Mapping[tuple[str, ...], float]]  # by key and labels


class Numbers:
    """What has been set so far; from any thread. A gauge that was not set is not told, a counter begins at 0.

    Args:
        job: whose metrics of the table these are.
        scopes: those that this process tells; what is set of others is passed over.
        traffic: asked at each scrape; None = nothing is told of storage.
    """

    def __init__(self, job: Job, scopes: Collection[Scope], traffic: Traffic | None = None) -> None:
        self._definitions = {d.key: d for d in DEFINITIONS if job in d.jobs}
        self._job, self._scopes, self._traffic = job, scopes, traffic
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {
            d.key: {(): 0.0} if d.kind == "counter" and not d.labels else {} for d in self._definitions.values()
        }

    def set(self, key: str, value: float, labels: Mapping[str, str]) -> None:
        """Set one number. Raises KeyError and ValueError: no such key, or not its labels."""
        self._change(key, labels, lambda _: value)

    def add(self, key: str, amount: float, labels: Mapping[str, str]) -> None:
        """Count further. Raises as `set`."""
        self._change(key, labels, lambda before: before + amount)

    def replace(self, key: str, value: Value) -> None:
        """Set all series of a metric, nested by its labels: those that are not in `value` are not told any more.

        Raises as `set`.
        """
        definition = self._definitions[key]
        numbers = list(flat(value))
        if any(len(labels) != len(definition.labels) for labels, _ in numbers):
            raise ValueError(f"{key}: {value!r}, but the table has the labels {list(definition.labels)}")
        if definition.scope not in self._scopes:
            return
        with self._lock:
            values = self._values[key]
            values.clear()
            for labels, number in numbers:
                values[_series(values, labels)] = number

    def forget(self, key: str) -> None:
        """Tell a gauge no more, until it is set again."""
        with self._lock:
            self._values[key].clear()

    def _change(self, key: str, labels: Mapping[str, str], new: Callable[[float], float]) -> None:
        definition = self._definitions[key]
        if labels.keys() != set(definition.labels):
            raise ValueError(f"{key}: labels {sorted(labels)}, but the table has {sorted(definition.labels)}")
        if definition.scope not in self._scopes:
            return
        with self._lock:
            values = self._values[key]
            series = _series(values, [labels[name] for name in definition.labels])
            values[series] = new(values.get(series, 0.0))

    def collect(self) -> Iterator[Metric]:
        """As Prometheus's registry asks for it."""
        with self._lock:
            values = {key: dict(series) for key, series in self._values.items()}
        traffic = self._traffic() if self._traffic is not None else {}
        return self._families(values, {key: dict(flat(value)) for key, value in traffic.items()})

    def describe(self) -> Iterator[Metric]:
        """The same without numbers, so that the registry knows which names it can be asked for."""
        return self._families({}, {})

    def _families(self, values: _Values, traffic: _Values) -> Iterator[Metric]:
        for definition in self._definitions.values():
            if definition.scope in self._scopes:
                yield _family(definition, self._job, values.get(definition.key, {}))
        if self._traffic is not None:
            for definition in DEFINITIONS:
                if "storage" in definition.jobs:
                    yield _family(definition, "storage", traffic.get(definition.key, {}))


def clean(label: str) -> str:
    """A label's value that no tool stumbles over: printable, of one line, not too long."""
    said = printable(label, one_line=True)
    return said if len(said) <= _LONGEST_LABEL else f"{said[: _LONGEST_LABEL - 1]}…"


def _series(values: Collection[tuple[str, ...]], labels: Sequence[str]) -> tuple[str, ...]:
    """Where a value of these labels stands beside those there are."""
    series = tuple(map(clean, labels))
    return series if series in values or len(values) < MOST_SERIES else (OTHER,) * len(series)


def _family(definition: Definition, subject: Subject, values: Mapping[tuple[str, ...], float]) -> Metric:
    name, told = definition.name(subject), definition.help
    if definition.unit != "1":
        told += f" ({definition.unit})"
    if definition.kind == "histogram":
        return _histogram(HistogramMetricFamily(name, told, labels=definition.labels), values)
    kind = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    family = kind(name, told, labels=definition.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(family: HistogramMetricFamily, values: Mapping[tuple[str, ...], float]) -> Metric:
    """Of values whose last label is a bucket's upper end, in rising order, or `sum`."""
    buckets: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for (*labels, end), value in values.items():
        if end != "sum":
            buckets.setdefault(tuple(labels), []).append((end, value))
    for series, counts in buckets.items():
        family.add_metric(series, counts, values[*series, "sum"])
    return family
