"""Curves for a page: points as data, which its script draws, and a table of their ends for whoever sees no curve."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.operate.numerals import number
from pipeline.operate.report.markup import Html, tag
from pipeline.operate.runs.numbers import Series, thinned

HUES = 8  # that the style has; later runs have them again, with other dashes
MOST_POINTS = 1000  # of a curve; each stands for a run of lines where there are more
_DIGITS = 6


Values = Sequence[float] | NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """One line of a chart; a value that is not finite leaves a gap, and a mark."""

    name: str
    steps: Values
    values: Values
    run: int | None = None  # of the page's runs, which may be hidden together
    hue: int | None = None  # which colour; None = by its place among the curves of the chart
    dash: int | None = None  # which pattern; None = by its place, too: colours alone do not tell all readers enough
    tone: float | None = None  # 0 to 1, of curves that have an order
    unsmoothed: bool = False  # few points that mean something each

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"curve {self.name!r}: {len(self.steps)} steps, {len(self.values)} values")


@dataclass(frozen=True)
class Chart:
    """Curves over steps, or over something else, that share a value axis."""

    title: str
    unit: str  # of the value axis
    curves: Sequence[Curve]
    note: str = ""
    smooth: bool = True  # draw a moving average, with the raw values pale behind it
    log_scale: bool = True  # offer a logarithmic value axis, where all values are positive
    across: str = ""  # what lies along the other axis; empty = steps
    group: str = ""  # charts that are zoomed together
    scale: str = ""  # charts of a group that have one range of values, so that they can be compared


def figure(chart: Chart, number: int, level: int = 3) -> Html | None:
    """A chart with a heading of a level; None when there is nothing at all to draw."""
    curves = [curve for curve in chart.curves if len(curve.values)]
    if not curves:
        return None
    points = [_points(curve) for curve in curves]
    log = chart.log_scale and all(v is None or v > 0 for p in points for v in p.get("low", p["mean"]))
    data = {
        "title": chart.title,
        "unit": chart.unit,
        "across": chart.across,
        "group": chart.group,
        **({"scale": chart.scale} if chart.scale else {}),
        "log": log,
        "smooth": chart.smooth,
        "curves": points,
    }
    coarse = max(point["lines"] for point in points)
    bands = ", where no more than three curves that have one are shown" if sum("low" in p for p in points) > 3 else ""
    said = f"Each point stands for {coarse:,.0f} lines of the log: the mean, and as a band least and greatest{bands}."
    notes = [tag("p", note) for note in (chart.note, said if coarse > 1 else "", _not_finite(curves)) if note]
    heading = f"chart-{number}"
    return tag(
        "figure",
        tag("div", tag(f"h{level}", chart.title, id=heading), class_="chart-head"),
        tag("figcaption", *notes, _ends(curves)),
        class_="chart",
        aria_labelledby=heading,
        data_chart=json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
    )


def swatch(run: int) -> Html:
    """What the curves of a run look like, beside its name."""
    again = " again" if run >= HUES else ""
    return tag("span", class_=f"swatch c{run % HUES}{again}", aria_hidden="true")


def charts(drawn: Sequence[Chart], number_from: int = 0, level: int = 3) -> Html | None:
    """Charts side by side, with headings of a level; None where all are empty."""
    figures = [one for i, chart in enumerate(drawn) if (one := figure(chart, number_from + i, level))]
    return tag("div", *figures, class_="charts") if figures else None


def _points(curve: Curve) -> dict[str, Any]:
    values = np.asarray(curve.values, np.float64)
    places = np.asarray(curve.steps)
    thin = thinned(Series((curve.name,), places, np.empty(0), values), MOST_POINTS)
    kept: dict[str, Any] = {
        "name": curve.name,
        "x": [round(float(x), _DIGITS) if places.dtype.kind == "f" else int(x) for x in thin.steps],
        "mean": _short(thin.mean),
        "lines": thin.lines_per_point,
        **({"run": curve.run} if curve.run is not None else {}),
        **({"hue": curve.hue} if curve.hue is not None else {}),
        **({"dash": curve.dash} if curve.dash is not None else {}),
        **({"tone": round(curve.tone, 3)} if curve.tone is not None else {}),
        **({"plain": True} if curve.unsmoothed else {}),
    }
    if thin.lines_per_point > 1:
        kept |= {"low": _short(thin.low), "high": _short(thin.high)}
    if len(thin.not_finite):
        kept["broken"] = thin.not_finite.tolist()
    return kept


def _short(values: NDArray[np.float64]) -> list[float | None]:
    """As JSON has them; what is not finite is None."""
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values]


def _not_finite(curves: Sequence[Curve]) -> str:
    """What is said of values that no curve can show."""
    found = [(curve, int((~np.isfinite(np.asarray(curve.values, np.float64))).sum())) for curve in curves]
    parts = [f"{curve.name}: {count:,} of {len(curve.values):,}" for curve, count in found if count]
    return f"Values that were not finite, marked below the curve: {'; '.join(parts)}." if parts else ""


def _ends(curves: Sequence[Curve]) -> Html:
    rows = []
    for curve in curves:
        values = np.asarray(curve.values, np.float64)
        finite = values[np.isfinite(values)]
        ends = (values[0], values[-1], finite.min(initial=np.inf), finite.max(initial=-np.inf))
        rows.append(
            tag("tr", tag("th", curve.name, scope="row"), *(tag("td", number(v), class_="number") for v in ends))
        )
    titles = ("first", "last", "least", "greatest")
    head = tag("tr", tag("td"), *(tag("th", title, scope="col", class_="number") for title in titles))
    whole = tag("table", tag("thead", head), tag("tbody", *rows))
    return tag("details", tag("summary", "as a table"), tag("div", whole, class_="scroll"), class_="ends")
