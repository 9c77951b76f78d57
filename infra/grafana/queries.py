"""Metrics of the table as panels: their full names, labels, units and help come from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra.grafana.panels import Panel, Query
from pipeline.metrics import DEFINITIONS, Definition, Subject

_UNITS = {"s": "s", "bytes": "bytes", "dB": "dB", "1": "none", "images/s": "none", "nats": "none", "ranks": "none"}
_RATES = {"bytes": "Bps", "requests": "reqps"}
_COUNT = "short"  # numbers of things: 12.3 K
_SHARES = ("mfu_ratio", "busy_ratio")
_OF_RUN = 'run=~"$run"'
_QUANTILES = ((0.5, "median"), (0.99, "slowest"))


class Board:
    """Panels of the processes of one job.

    Args:
        job: whose numbers they show.
    """

    def __init__(self, job: Subject) -> None:
        self.job = job
        self._who = "worker {{worker}}" if job == "encode" else "rank {{rank}}"

    def find(self, key: str, subject: Subject | None = None) -> Definition:
        """A metric of the table, of this job where no other subject is named. Raises KeyError."""
        for definition in DEFINITIONS:
            if definition.key == key and (subject or self.job) in definition.jobs:
                return definition
        raise KeyError(f"{key}: not in the metric table for {subject or self.job}")

    def selected(self, key: str) -> str:
        """A metric's series of the chosen runs: `lathe_train_loss{run=~"$run"}`."""
        return f"{self.find(key).name(self.job)}{{{_OF_RUN}}}"

    def curves(self, title: str, *keys: str, **looks: Any) -> Panel:
        """Values of gauges, and how fast counters grow, as the table's labels tell their series apart."""
        found = [self.find(key) for key in keys]
        queries = [self._query(d, d.key.removesuffix("_seconds") if len(found) > 1 else "") for d in found]
        return Panel(title, queries, _unit(found[0]), _told(found), **looks)

    def ages(self, title: str, *keys: str, **looks: Any) -> Panel:
        """Seconds since the moments that metrics tell."""
        found = [self.find(key) for key in keys]
        queries = [Query(f"time() - {self.selected(d.key)}", self._legend(d)) for d in found]
        return Panel(title, queries, "s", _told(found, "Time since: "), **looks)

    def number(self, title: str, expr: str, unit: str, description: str, width: int = 4) -> Panel:
        """The value of now, one for each run."""
        return Panel(title, [Query(expr, "{{run}}")], unit, description, "stat", width)

    def storage(self) -> list[Panel]:
        """What the processes of this job ask of their stores."""
        return [
            self._traffic("Requests by operation", "requests"),
            self._traffic("Requests repeated, and given up by what was wrong", "retries", "errors"),
            self._traffic("Bytes per second", "read_bytes", "written_bytes"),
            self._latency(),
        ]

    def _query(self, definition: Definition, what: str) -> Query:
        if definition.kind == "counter":
            occurs = " > 0" if definition.labels else ""  # every known reason is told from the start
            return Query(self._rate(definition, self.job) + occurs, self._legend(definition, what, is_of_process=False))
        return Query(self.selected(definition.key), self._legend(definition, what))

    def _rate(self, definition: Definition, subject: Subject) -> str:
        """A counter's growth per second, over all processes of a run."""
        series = f"{definition.name(subject)}{{{self._of(subject)}}}"
        return f"sum by ({', '.join(('run', *definition.labels))}) (rate({series}[$__rate_interval]))"

    def _of(self, subject: Subject) -> str:
        return f'{_OF_RUN}, lathe_job="{self.job}"' if subject == "storage" else _OF_RUN

    def _legend(self, definition: Definition, what: str = "", *, is_of_process: bool = True) -> str:
        words = ["{{run}}", self._who] if is_of_process and definition.scope == "local" else ["{{run}}"]
        return " ".join([*words, *([what] if what else []), *(f"{{{{{label}}}}}" for label in definition.labels)])

    def _traffic(self, title: str, *keys: str) -> Panel:
        found = [self.find(key, "storage") for key in keys]
        queries = [
            Query(self._rate(d, "storage"), self._legend(d, d.key if len(found) > 1 else "", is_of_process=False))
            for d in found
        ]
        return Panel(title, queries, _unit(found[0]), _told(found), width=6)

    def _latency(self) -> Panel:
        definition = self.find("request_seconds", "storage")
        buckets = f"{definition.name('storage')}_bucket{{{self._of('storage')}}}"
        rates = f"sum by (run, {', '.join(definition.labels)}, le) (rate({buckets}[$__rate_interval]))"
        legend = self._legend(definition, is_of_process=False)
        queries = [Query(f"histogram_quantile({q}, {rates})", f"{legend} {word}") for q, word in _QUANTILES]
        return Panel(
            "Seconds of a request, median and slowest of a hundred", queries, "s", _told([definition]), width=6
        )


def _unit(definition: Definition) -> str:
    if definition.kind == "counter":
        return _RATES.get(definition.unit, "none")
    if definition.key in _SHARES:
        return "percentunit"
    return _UNITS.get(definition.unit, _COUNT)


def _told(definitions: Sequence[Definition], before: str = "") -> str:
    return "\n\n".join(f"{before}{d.help}" + f" ({d.unit})" * (d.unit != "1") for d in definitions)
