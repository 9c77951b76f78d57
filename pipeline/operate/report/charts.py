"""Curves as SVG inside the page: axes, raw values behind their moving average, linear and logarithmic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from pipeline.operate.report.facts import Chart, Curve
from pipeline.operate.report.markup import Html, join, tag

WIDTH, HEIGHT = 460, 278
LEFT, RIGHT, TOP, BOTTOM = 52, 448, 24, 240  # of the plot, in units of the view box
MOST_POINTS = 500  # per drawn line
COLOURS = 6  # classes c0..c5 in page.css


@dataclass(frozen=True)
class Axis:
    """A number range laid on a length."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between `start` and `end`."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Up to nine round numbers within the range."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def figure(chart: Chart, number: int) -> Html | None:
    """A chart with legend and, where it makes sense, a switch to a logarithmic axis. None when nothing is finite."""
    curves = [thinned for curve in chart.curves if (thinned := finite(curve)).values]
    if not curves:
        return None
    averages = [smooth(curve) if chart.smooth else None for curve in curves]
    smoothed = [average and _thin(average) for average in averages]
    log = chart.log_scale and all(value > 0 for curve in curves for value in curve.values)
    name = f"log-{number}"
    switch = (
        tag("input", type="checkbox", id=name, class_="log-switch"),
        tag("label", "logarithmic", for_=name, class_="log-label"),
    )
    return tag(
        "figure",
        tag("h3", chart.title),
        *(switch if log else ()),
        _svg(chart, curves, smoothed, log=False),
        _svg(chart, curves, smoothed, log=True) if log else None,
        tag("p", class_="readout", aria_live="polite"),
        tag("figcaption", _legend(curves, smoothed), tag("p", chart.note) if chart.note else None),
        class_="chart",
        data_curves=json.dumps([_readable(_thin(s or c)) for c, s in zip(curves, smoothed, strict=True)]),
        data_plot=json.dumps([WIDTH, LEFT, RIGHT, *_step_range(curves)]),
    )


def finite(curve: Curve) -> Curve:
    """The curve without its values that are no numbers."""
    kept = [(s, float(v)) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    return Curve(curve.name, [s for s, _ in kept], [v for _, v in kept])


def smooth(curve: Curve) -> Curve | None:
    """Mean over a fortieth of the points to each side, so that it does not lag; None when there are few."""
    count = len(curve.values)
    if count < 20:
        return None
    half = max(2, count // 40)
    sums = [0.0, *accumulate(curve.values)]
    windows = ((max(0, i - half), min(count, i + half + 1)) for i in range(count))
    return Curve(curve.name, curve.steps, [(sums[end] - sums[start]) / (end - start) for start, end in windows])


def _svg(chart: Chart, curves: Sequence[Curve], smoothed: Sequence[Curve | None], *, log: bool) -> Html:
    first, last = _step_range(curves)
    x = Axis(first, last, LEFT, RIGHT)
    y = _value_axis(curves, log=log)
    lines = []
    for i, (curve, average) in enumerate(zip(curves, smoothed, strict=True)):
        colour = f"c{i % COLOURS}"
        lines.append(_path(_thin(curve), x, y, f"{colour} raw" if average else colour))
        if average:
            lines.append(_path(average, x, y, colour))
    return tag(
        "svg",
        *(_grid_line(y.place(value), _number(value)) for value in y.ticks()),
        *(_step_label(x.place(value), f"{value:,.0f}") for value in x.ticks() if value == round(value)),
        tag("text", "step", x=RIGHT, y=HEIGHT - 4, class_="axis", text_anchor="end"),
        tag("text", chart.unit, x=LEFT, y=13, class_="axis"),
        *lines,
        tag("line", class_="cursor", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="logarithmic" if log else "linear",
        role="img",
        tabindex=0,
        aria_label=f"{chart.title}{', logarithmic' if log else ''}. " + " ".join(_in_words(c) for c in curves),
    )


def _step_range(curves: Sequence[Curve]) -> tuple[int, int]:
    return min(min(c.steps) for c in curves), max(max(c.steps) for c in curves)


def _value_axis(curves: Sequence[Curve], *, log: bool) -> Axis:
    """The values' range, widened to what the eye expects: from 0 where that is near, a little air elsewhere."""
    values = [v for c in curves for v in c.values]
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.1, high * 1.1, BOTTOM, TOP, log=True)
    air = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return Axis(0.0 if 0 <= low < high * 0.6 else low - air, high + air, BOTTOM, TOP)


def _path(curve: Curve, x: Axis, y: Axis, class_: str) -> Html:
    points = [(x.place(s), y.place(v)) for s, v in zip(curve.steps, curve.values, strict=True)]
    if len(points) == 1:
        return tag("circle", cx=points[0][0], cy=points[0][1], r=3, class_=class_)
    return tag("path", d="M" + "L".join(f"{px:g} {py:g}" for px, py in points), class_=class_)


def _grid_line(y: float, label: str) -> Html:
    return join(
        tag("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"),
        tag("text", label, x=LEFT - 6, y=y + 4, text_anchor="end"),
    )


def _step_label(x: float, label: str) -> Html:
    return join(
        tag("line", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4, class_="tick"),
        tag("text", label, x=x, y=BOTTOM + 18, text_anchor="end" if x > RIGHT - 20 else "middle"),
    )


def _legend(curves: Sequence[Curve], smoothed: Sequence[Curve | None]) -> Html:
    entries = []
    for i, (curve, average) in enumerate(zip(curves, smoothed, strict=True)):
        last = (average or curve).values[-1]
        swatch = tag("span", class_=f"swatch c{i % COLOURS}")
        entries.append(tag("li", swatch, curve.name, " ", tag("span", f"{_number(last)} at the end", class_="quiet")))
    return tag("ul", *entries, class_="legend")


def _in_words(curve: Curve) -> str:
    first, last = curve.values[0], curve.values[-1]
    return (
        f"{curve.name}: {_number(first)} at step {curve.steps[0]}, {_number(last)} at step {curve.steps[-1]},"
        f" lowest {_number(min(curve.values))}."
    )


def _readable(curve: Curve) -> dict[str, object]:
    return {"name": curve.name, "steps": list(map(int, curve.steps)), "values": [_number(v) for v in curve.values]}


def _thin(curve: Curve) -> Curve:
    """At most `MOST_POINTS` of the points, evenly, the first and the last among them."""
    count = len(curve.values)
    if count <= MOST_POINTS:
        return curve
    kept = [round(i * (count - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]
    return Curve(curve.name, [curve.steps[i] for i in kept], [curve.values[i] for i in kept])


def _linear_ticks(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for multiples in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10)))):
        ticks = [m * 10.0**e for e in exponents for m in multiples if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 8)]
    return _linear_ticks(low, high)


def _number(value: float) -> str:
    """Three significant digits, without an exponent where it can be read without."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
