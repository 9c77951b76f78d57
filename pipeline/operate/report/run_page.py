"""The page of a run, or of several beside each other: one section per kind of fact, none for what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline import __version__
from pipeline.console import duration
from pipeline.operate.numerals import in_units, number
from pipeline.operate.report.charts import MOST_POINTS, Chart, charts, swatch
from pipeline.operate.report.document import Section, card, document, table
from pipeline.operate.report.encode_section import encode_section
from pipeline.operate.report.markup import Html, join, tag
from pipeline.operate.report.pictures import album
from pipeline.operate.report.plans import LOSSES, OPTIMISATION, THROUGHPUT
from pipeline.operate.report.records import configuration, data_sets, differences, environment
from pipeline.operate.report.run_charts import first_shared, level_charts, others, planned
from pipeline.operate.report.toolbar import Axis, toolbar
from pipeline.operate.runs.find import KINDS
from pipeline.operate.runs.numbers import Key, Series, passed
from pipeline.operate.runs.run import Run
from pipeline.operate.runs.state import State

_FIRST = ("losses", "levels")  # before the pictures
_DASH = "\u2013"
_MOST_LINES = 200  # of starts, in the curves of a run


@dataclass(frozen=True)
class Seen:
    """A run, and how it was with it when it was looked at."""

    run: Run
    state: State


def run_page(seen: Sequence[Seen], now: float) -> str:
    """The whole document. `now`: Unix time at which the runs were looked at."""
    names = ", ".join(one.run.name for one in seen)
    kinds = ", ".join(dict.fromkeys(KINDS[one.run.found.kind] for one in seen))
    title = f"{names if len(seen) <= 4 else f'{len(seen)} runs'}: {kinds}"
    states = (
        join("; " if place else None, f"{one.run.name} " if len(seen) > 1 else None, _state(one.state))
        for place, one in enumerate(seen)
    )
    made = f"As of {_moment(now)}, by lathe {__version__}."
    return document(title, join(*states, ". ", made), list(_sections(seen)))


def _sections(seen: Sequence[Seen]) -> Iterator[Section]:
    runs = [one.run for one in seen]
    yield Section("overview", "Overview", _overview(seen))
    drawn = list(_drawn_sections([run for run in runs if run.found.kind != "encode"], runs))
    yield from (section for section in drawn if section.anchor in _FIRST)
    if pictures := album(runs):
        yield Section("pictures", "Pictures", pictures)
    yield from (section for section in drawn if section.anchor not in _FIRST)
    for title, anchor, content in (
        ("Encoding", "encoding", encode_section([run for run in runs if run.found.kind == "encode"])),
        ("Differences", "differences", differences(runs)),
        ("Configuration", "configuration", configuration(runs)),
        ("Data", "data", data_sets(runs)),
        ("Environment", "environment", environment(runs)),
    ):
        if content:
            yield Section(anchor, title, content)


def _drawn_sections(logged: Sequence[Run], runs: Sequence[Run]) -> Iterator[Section]:
    """Curves, of each kind of run apart: a loss of one means nothing beside that of another."""
    groups: dict[str, tuple[str, Callable[[Sequence[Run], Sequence[int]], list[Chart]]]] = {
        "losses": ("Losses", lambda group, places: planned(LOSSES, group, places)),
        "levels": ("Loss by noise level", level_charts),
        "optimisation": ("Optimisation", lambda group, places: planned(OPTIMISATION, group, places)),
        "throughput": ("Throughput", lambda group, places: planned(THROUGHPUT, group, places)),
        "others": ("Other numbers", others),
    }
    having = [run for run in logged if len(run.numbers)]
    is_mixed = len({run.found.kind for run in having}) > 1
    controls: Html | None = toolbar([_axis(run) for run in runs] if having else ())
    count = 0
    for anchor, (title, make) in groups.items():
        shown: list[Html] = []
        for kind, said in KINDS.items():
            group = [run for run in having if run.found.kind == kind]
            made: list[Chart] = make(group, [runs.index(run) for run in group]) if group else []
            drawn = charts([replace(chart, group=kind) for chart in made], count, level=4 if is_mixed else 3)
            count += len(made)
            if drawn:
                shown += [tag("h3", said.capitalize()), drawn] if is_mixed else [drawn]
        if shown:
            yield Section(anchor, title, join(*shown), controls)
            controls = None


def _axis(run: Run) -> Axis:
    """Steps with the hours since the first line, a few of them, pauses included."""
    steps, times = run.numbers.steps, run.numbers.times
    kept = np.isfinite(times)
    steps, times = steps[kept], times[kept]
    places = np.unique(np.linspace(0, max(len(steps) - 1, 0), min(len(steps), MOST_POINTS)).astype(int))
    seen = run.numbers.get("samples_seen")
    per_step = float(seen.last / seen.steps[-1]) if seen is not None and seen.steps[-1] > 0 else np.nan
    return Axis(
        run.name,
        len(run.numbers) > 0,
        per_step if 0 < per_step < np.inf else None,
        [int(s) for s in steps[places]],
        [float(h) for h in passed(times)[places] / 3600],
        sorted(set(run.start_steps) - {0})[-_MOST_LINES:],
    )


def _overview(seen: Sequence[Seen]) -> Html:
    problems = [
        join(tag("strong", f"{one.run.name}: ") if len(seen) > 1 else None, said)
        for one in seen
        for said in _missing(one.run)
    ]
    listed = tag("ul", *(tag("li", said) for said in problems), class_="problems", aria_label="What is missing")
    shown = _cards(seen[0]) if len(seen) == 1 else _table(seen)
    return join(shown, listed if problems else None)


def _missing(run: Run) -> Iterator[str]:
    yield from run.problems
    if run.found.kind == "encode":
        return
    if not len(run.numbers):
        yield "its log has no line yet, so there is no curve"
    if run.numbers.superseded:
        yield f"lines of its log that a later start told again, left out: {run.numbers.superseded:,}"
    if run.numbers.ignored:
        yield f"values of its log that are no numbers of a metric, left out: {run.numbers.ignored:,}"
    loss = run.numbers.get("loss")
    if loss is not None and (bad := int((~np.isfinite(loss.values)).sum())):
        yield f"{bad:,} of {len(loss.values):,} logged losses are not finite"
    if not run.config:
        yield "its run file is not there: it was written by an older version, or before the first checkpoint"
    if not run.starts:
        yield "versions and hardware were not noted, as by an older version"


def _cards(one: Seen) -> Html:
    cards = [card("State", one.state.word, "", one.state.said or KINDS[one.run.found.kind])]
    cards += [card(title, value, unit, meaning) for title, value, unit, meaning in _figures(one.run)]
    return tag("dl", *cards, class_="numbers")


def _table(seen: Sequence[Seen]) -> Html:
    weights = first_shared([_weights(one.run) for one in seen])
    figures = [
        {title: f"{value} {unit}".strip() for title, value, unit, _ in _figures(one.run, weights, named=True)}
        for one in seen
    ]
    columns = list(dict.fromkeys(title for found in figures for title in found))
    rows = [
        (
            join(swatch(place), one.run.name),
            [_state(one.state), *(found.get(title, _DASH) for title in columns)],
        )
        for place, (one, found) in enumerate(zip(seen, figures, strict=True))
    ]
    return table(("run", "state", *columns), rows, kind="summary")


def _figures(run: Run, weights: str | None = None, *, named: bool = False) -> Iterator[tuple[str, str, str, str]]:
    """Title, value, unit and meaning of the numbers that sum a run up.

    Args:
        run: as it is now.
        weights: whose held-out loss is told; None, or those that it does not have = its first.
        named: whether the title says which these are.
    """
    if run.found.kind == "encode":
        yield from _encode_figures(run)
        return
    numbers, target = run.numbers, run.target
    if numbers.last_step is not None:
        of = f"of {target:,}" if target else ""
        yield "Steps", f"{numbers.last_step:,}", of, _spent(run)
    if loss := numbers.get("loss"):
        yield _loss(loss)
    yield from _held_out(run, weights, named=named)
    if (psnr := run.marker.get("psnr_db")) and isinstance(psnr, float | int):
        yield "Reconstruction", number(float(psnr)), "dB", f"PSNR on {run.marker.get('psnr_on', 'pictures')}."
    if rate := numbers.get("images_per_second"):
        yield "Throughput", number(float(np.median(rate.finite)) if len(rate.finite) else np.nan), "images/s", "Median."
    wait, step = numbers.get("data_wait_seconds"), numbers.get("step_seconds")
    if wait is not None and step is not None and step.finite.sum():
        share = 100 * wait.finite.sum() / step.finite.sum()
        yield "Data wait", f"{share:.1f}", "%", "The share of all steps' time that waited for data."
    if epoch := numbers.last("epoch"):
        seen = numbers.last("samples_seen")
        yield "Epochs", number(epoch), "", f"{seen:,.0f} samples." if seen else ""
    if skipped := numbers.last("skipped_steps"):
        yield "Skipped steps", f"{skipped:,.0f}", "", "Their loss or gradient was not finite."


def _loss(loss: Series) -> tuple[str, str, str, str]:
    tail = loss.values[-max(1, len(loss.values) // 20) :]
    kept = tail[np.isfinite(tail)]
    bad = len(tail) - len(kept)
    said = f"; {bad:,} of its {len(tail):,} are not finite" if bad else ""
    return (
        "Loss",
        number(float(kept.mean()) if len(kept) else np.nan),
        "",
        f"Mean of the last twentieth of the log{said}.",
    )


def _weights(run: Run) -> dict[str, Key]:
    """Keys of held-out losses by the weights that they are of."""
    return {" ".join(key[1:]): key for key in run.numbers.named("validation_loss")}


def _held_out(run: Run, weights: str | None, *, named: bool) -> Iterator[tuple[str, str, str, str]]:
    there = _weights(run)
    chosen = weights if weights in there else next(iter(there), "")
    held_out = run.numbers.get(*there[chosen]) if there else None
    if held_out is not None and len(held_out.finite):
        best = held_out.steps[np.nanargmin(held_out.values)]
        least = f"{number(float(held_out.finite.min()))} at step {best:,}"
        meaning = f"By {chosen}, after the last validation; the lowest was {least}."
        yield f"Held-out loss, {chosen}" if named else "Held-out loss", number(held_out.last), "", meaning


def _encode_figures(run: Run) -> Iterator[tuple[str, str, str, str]]:
    parts = run.encoded
    yield (
        "Shards",
        f"{sum(part.tally.shards for part in parts):,}",
        "",
        f"In {len(parts)} resolutions." * (len(parts) > 1),
    )
    yield (
        "Samples",
        f"{sum(part.samples for part in parts):,}",
        "",
        f"{sum(part.holdout for part in parts):,} of them held out.",
    )
    rejected = sum(sum(part.reasons[0].values()) for part in parts)
    total = rejected + sum(part.samples for part in parts)
    yield "Rejected", f"{100 * rejected / total if total else 0.0:.2f}", "%", f"{rejected:,} samples could not be used."
    size, unit = in_units(sum(part.bytes for part in parts)).split()
    yield "Size", size, unit, "Of all latent shards."


def _spent(run: Run) -> str:
    times = run.numbers.times
    times = times[np.isfinite(times)]
    checkpoints = run.checkpoints
    parts = (
        [f"{duration(float(passed(times)[-1]))} from the first line of the log to the last."] if len(times) > 1 else []
    )
    parts += [f"{len(run.starts)} starts."] if len(run.starts) > 1 else []
    parts += [f"Newest checkpoint: step {max(checkpoints):,}."] if checkpoints else []
    return " ".join(parts)


def _state(state: State) -> Html:
    return join(tag("span", state.word, class_=f"state {state.word}"), f" ({state.said})" if state.said else None)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
