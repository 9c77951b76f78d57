"""Dashboards in the classic JSON model that Grafana 9 and later read.

Source: Grafana's own schema, `kinds/dashboard/dashboard_kind.cue` and the plugins' `panelcfg.cue`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
_HEIGHTS = {"timeseries": 8, "stat": 4}
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA_VERSION = 36  # of Grafana 9; later ones bring it up to theirs


@dataclass(frozen=True)
class Query:
    """What is asked of Prometheus, and what its series are called: `{{run}}` is a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: above it.
        queries: what it shows.
        unit: of Grafana's, such as `s`, `bytes`, `percentunit`.
        description: what it means, for who points at it.
        kind: curves, or the last value in large letters.
        width: of the dashboard's 24 columns.
        is_log: whether the axis is logarithmic.
        is_stacked: whether curves lie on one another, as parts of a whole; each run has such a panel of its own.
    """

    title: str
    queries: Sequence[Query]
    unit: str
    description: str
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    is_log: bool = False
    is_stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    """One page.

    Args:
        uid: of its address, `/d/UID`; also the name of its file.
        title: above it.
        description: what it is for.
        runs: the metric whose label `run` tells which runs there are.
        rows: from the top.
    """

    uid: str
    title: str
    description: str
    runs: str
    rows: Sequence[Row]


def rendered(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["lathe"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "schemaVersion": _SCHEMA_VERSION,
        "templating": {"list": [_datasource_variable(), _run_variable(dashboard.runs)]},
        "annotations": {"list": [_alerts()]},
        "links": [_link_to_others()],
        "panels": list(_placed(dashboard.rows)),
    }


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Rows and panels with their places, from left to right and from the top."""
    number, top = 1, 0
    for row in rows:
        yield _row(row.title, number, top)
        number, top, left, height = number + 1, top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top, height = 0, top + height, 0
            place = {"h": _HEIGHTS[panel.kind], "w": panel.width, "x": left, "y": top}
            yield _panel(panel, number, place)
            number, left, height = number + 1, left + panel.width, max(height, place["h"])
        top += height


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    place = {"h": 1, "w": COLUMNS, "x": 0, "y": top}
    return {"type": "row", "id": number, "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": _DATASOURCE,
            "editorMode": "code",
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": panel.kind == "timeseries",
            "instant": panel.kind == "stat",
        }
        for i, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "color": {"mode": "palette-classic"}}
    if panel.kind == "timeseries":
        defaults["custom"] = _curves(panel)
    return {
        "type": panel.kind,
        "id": number,
        "title": f"{panel.title}: $run" if panel.is_stacked else panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _curve_options() if panel.kind == "timeseries" else _stat_options(),
        **({"repeat": "run", "repeatDirection": "v"} if panel.is_stacked else {}),
    }


def _curves(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.is_stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.is_log else {"type": "linear"},
    }


def _curve_options() -> dict[str, Any]:
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def _stat_options() -> dict[str, Any]:
    return {
        "reduceOptions": {"values": False, "calcs": ["lastNotNull"], "fields": ""},
        "orientation": "auto",
        "textMode": "auto",
        "colorMode": "none",
        "graphMode": "none",
        "justifyMode": "auto",
    }


def _datasource_variable() -> dict[str, Any]:
    return {"type": "datasource", "name": "datasource", "label": "Prometheus", "query": "prometheus", "hide": 0}


def _run_variable(metric: str) -> dict[str, Any]:
    query = f"label_values({metric}, run)"
    return {
        "type": "query",
        "name": "run",
        "label": "Run",
        "datasource": _DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "run"},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "hide": 0,
    }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": _DATASOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Lathe.+", alertstate="firing", run=~"$run"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{run}}",
        "step": "30s",
    }


def _link_to_others() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Lathe",
        "tags": ["lathe"],
        "asDropdown": True,
        "keepTime": True,
        "includeVars": False,
        "targetBlank": False,
        "icon": "external link",
        "tooltip": "",
        "url": "",
    }
