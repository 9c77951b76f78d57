"""The numbers of logs as charts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from pipeline.metrics import DEFINITIONS
from pipeline.operate.report.charts import HUES, Chart, Curve
from pipeline.operate.report.plans import LEVELS, PLANNED, Plan
from pipeline.operate.runs.numbers import Key, Numbers, Series
from pipeline.operate.runs.run import Run

_LEVEL = re.compile(r"\d+_(\d{1,9}(?:\.\d+)?)-(\d{1,9}(?:\.\d+)?)")
_MOST_PROFILES = 6
_LEVELS_NOTE = (
    "Squared error without weighting, by equal parts of the distribution of times that is trained. The level is"
    " sigma / sqrt(alpha\u00b2 + sigma\u00b2): 0 is data, 1 is noise."
)


def planned(plans: Iterable[Plan], runs: Sequence[Run], places: Sequence[int]) -> list[Chart]:
    """The charts that some of the runs have numbers for.

    Args:
        plans: in order.
        runs: of one kind.
        places: the number of each on the page.
    """
    return [
        Chart(plan.title, plan.unit, curves, plan.note, plan.smooth, plan.log_scale)
        for plan in plans
        if (curves := list(_curves(plan, runs, places))) and not _says_nothing(curves, plan.unless)
    ]


def others(runs: Sequence[Run], places: Sequence[int]) -> list[Chart]:
    """A chart of each number that has no place yet, as of a newer version; titled as the table of metrics has it."""
    told = {definition.key: definition for definition in DEFINITIONS if {"train", "first_stage"} & set(definition.jobs)}
    metrics = dict.fromkeys(key[0] for run in runs for key in run.numbers.named() if key[0] not in PLANNED)
    plans = [
        Plan(
            name.replace("_", " ").capitalize(),
            told[name].unit if name in told else "",
            {name: name.replace("_", " ")},
            f"{told[name].help}." if name in told else "",
        )
        for name in metrics
    ]
    return planned(plans, runs, places)


def level_charts(runs: Sequence[Run], places: Sequence[int]) -> list[Chart]:
    """Loss by noise level: over the steps of each run, then over the levels."""
    compares = len(runs) > 1
    over_steps, over_levels = [], []
    for metric in LEVELS:
        profiles: list[Curve] = []
        held_out = metric == "validation_level_loss"
        found = [_level_groups(run.numbers, metric) for run in runs]
        shared = first_shared(found)
        for run, place, groups in zip(runs, places, found, strict=True):
            one = [name for name in groups if shared in (name, None)][:1]  # a comparison of all would be too full
            for number, weights in enumerate(one if compares else groups):
                levels = groups[weights]
                called = " ".join(filter(None, ["held out," if held_out else "training", weights]))
                over = Chart(
                    f"Loss by noise level, {called}{f': {run.name}' if compares else ''}",
                    "squared error",
                    [
                        Curve(_level_name(s), s.steps, s.values, run=place, tone=_tone(i, len(levels)))
                        for i, s in enumerate(levels)
                    ],
                    scale=metric,
                )
                over_steps.append(over)
                most = 1 if compares or number else _MOST_PROFILES
                own = f"{run.name}, {weights}" if shared is None else run.name
                name, hue = (own, place) if compares else (called.split(", ")[-1], None)
                profiles += _profiles(levels, name, most, run=place, hue=hue)
        if profiles:
            title = f"Loss over the noise level, {'held out' if held_out else 'training'}"
            over = Chart(title, "squared error", profiles, _LEVELS_NOTE, smooth=False, across="noise level")
            over_levels.append(over)
    return over_steps + over_levels


def first_shared(names: Sequence[Collection[str]]) -> str | None:
    """The first of the names that is in all of those that have any; None where there is none."""
    having = [one for one in names if one]
    return next((name for name in having[0] if all(name in one for one in having)), None) if having else None


def _curves(plan: Plan, runs: Sequence[Run], places: Sequence[int]) -> Iterator[Curve]:
    compares = len(runs) > 1
    there = [(run, place, list(_found(plan, run.numbers))) for run, place in zip(runs, places, strict=True)]
    names = list(dict.fromkeys(name for _, _, found in there for name, _, _ in found))
    for run, place, found in there:
        for name, series, few in found:
            called = " ".join([run.name, *([name] if len(names) > 1 else [])]) if compares else name
            values = series.values / plan.scale
            if plan.share_of and (whole := run.numbers.get(plan.share_of)):
                values = values / np.interp(series.steps, whole.steps, whole.values)
            hue, dash = (place, names.index(name) + place // HUES * len(names)) if compares else (None, None)
            yield Curve(called, series.steps, values, run=place, hue=hue, dash=dash, unsmoothed=few)


def _says_nothing(curves: Sequence[Curve], usual: float | None) -> bool:
    return usual is not None and all(np.all(np.asarray(curve.values) == usual) for curve in curves)


def _found(plan: Plan, numbers: Numbers) -> Iterator[tuple[str, Series, bool]]:
    """What the curves of a plan are called, their numbers, and whether these are few: of validations, not of lines."""
    for metric, name in plan.keys.items():
        for key in numbers.named(metric):
            series = numbers.get(*key)
            if series is not None:
                yield ", ".join([name, *key[1:]]), series, metric.startswith("validation_")


def _level_groups(numbers: Numbers, metric: str) -> dict[str, list[Series]]:
    """The levels of each of the weights, in order; "" for the training's own."""
    groups: dict[str, list[Series]] = {}
    for key in numbers.named(metric):
        if (series := numbers.get(*key)) is not None and len(key) > 1:
            groups.setdefault(" ".join(key[1:-1]), []).append(series)
    return {weights: sorted(levels, key=lambda s: _order(s.key)) for weights, levels in groups.items()}


def _profiles(levels: Sequence[Series], name: str, most: int, *, run: int, hue: int | None) -> Iterator[Curve]:
    """The levels at a few steps, from the first to the last; at the last alone where one is wanted."""
    steps = np.unique(np.concatenate([s.steps for s in levels]))
    most = min(most, len(steps))
    chosen = [steps[-1]] if most == 1 else [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    for number, step in enumerate(chosen):
        at = [(_middle(s.key), s.values[s.steps == step][-1:]) for s in levels]
        points = [(middle, float(value[0])) for middle, value in at if len(value)]
        places, values = [middle for middle, _ in points], [value for _, value in points]
        tone = None if hue is not None else _tone(number + (most == 1), most + (most == 1))
        dash = None if hue is None else hue // HUES
        yield Curve(f"{name}, step {step:,}", places, values, run=run, hue=hue, tone=tone, dash=dash, unsmoothed=True)


def _level_name(series: Series) -> str:
    found = _LEVEL.fullmatch(series.key[-1])
    return f"{found[1]} to {found[2]}" if found else series.key[-1]


def _middle(key: Key) -> float:
    found = _LEVEL.fullmatch(key[-1])
    return (float(found[1]) + float(found[2])) / 2 if found else 0.0


def _order(key: Key) -> tuple[int, str]:
    first = key[-1].partition("_")[0]
    return (int(first) if first.isdecimal() and len(first) < 10 else 0, key[-1])


def _tone(number: int, count: int) -> float:
    return number / max(1, count - 1)
