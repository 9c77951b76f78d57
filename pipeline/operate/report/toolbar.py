"""What a reader may set for all curves of a page at once. Its script shows it; without a script it would do nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.operate.report.charts import swatch
from pipeline.operate.report.markup import Html, tag

_HELP = (
    "Drag across a curve to zoom in, double-click to see all of it; click a name to hide its curve. With the keyboard:"
    " arrow keys read the values, + and \u2212 zoom, 0 shows all. Pale: as logged. Strong: moving average."
)
_STARTS = " Dotted upright lines: where a run was started again."


@dataclass(frozen=True)
class Axis:
    """Of one run: what else than steps its curves may be laid along."""

    name: str
    has_curves: bool
    samples_per_step: float | None  # None = not known
    steps: Sequence[int]  # some, ascending, and the hours since the first line at each of them
    hours: Sequence[float]
    starts: Sequence[int] = ()  # steps at which it was started again


def toolbar(runs: Sequence[Axis] = ()) -> Html:
    """The controls. `runs` are those of the page, in the order that curves name them by."""
    data = [
        {
            "name": r.name,
            "samples": r.samples_per_step,
            "steps": list(r.steps),
            "hours": [round(h, 5) for h in r.hours],
            "starts": list(r.starts),
        }
        for r in runs
    ]
    smoothing = tag(
        "span",
        tag("label", "smoothing", for_="smoothing"),
        tag("input", type="range", id="smoothing", min=0, max=40, value=5, step=1),
        tag("output", "5 %", for_="smoothing", id="smoothing-value"),
        class_="control",
    )
    reset = tag("button", "show all", type="button", id="reset", disabled="")
    return tag(
        "div",
        tag("p", _HELP + _STARTS * any(run.starts for run in runs), class_="quiet"),
        tag(
            "div", _across(runs), smoothing, _toggles(runs), reset, class_="toolbar", role="group", aria_label="Curves"
        ),
        tag("noscript", tag("p", "The curves are drawn by a script, which does not run here: see the tables.")),
        id="curves",
        data_runs=json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
    )


def _across(runs: Sequence[Axis]) -> Html | None:
    drawn = [run for run in runs if run.has_curves]
    choices = ["steps"] if drawn else []
    choices += ["samples"] if drawn and all(run.samples_per_step for run in drawn) else []
    choices += ["hours"] if drawn and all(len(run.hours) > 1 for run in drawn) else []
    if len(choices) < 2:
        return None
    options = (tag("option", choice, value=choice) for choice in choices)
    return tag("span", tag("label", "along", for_="along"), tag("select", *options, id="along"), class_="control")


def _toggles(runs: Sequence[Axis]) -> Html | None:
    drawn = [number for number, run in enumerate(runs) if run.has_curves]
    if len(drawn) < 2:
        return None
    buttons = (
        tag(
            "button",
            swatch(number),
            runs[number].name,
            type="button",
            class_="run-toggle",
            aria_pressed="true",
            data_run=number,
        )
        for number in drawn
    )
    return tag("span", *buttons, class_="control", role="group", aria_label="Runs")
