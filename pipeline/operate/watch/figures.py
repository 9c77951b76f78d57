"""What is told of a watched run: a few figures, each with its course."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.operate.numerals import in_units, number
from pipeline.operate.runs.numbers import Series, thinned
from pipeline.operate.runs.run import Run

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII = "_.-=+*#@"
_GAP = " "


@dataclass(frozen=True)
class Figure:
    """One number, and how it came to it."""

    name: str
    value: str
    course: Series | None = None
    short: bool = True  # told in a line of a log too
    _drawn: dict[tuple[int, str], str] = field(default_factory=dict, compare=False)

    def drawn(self, width: int, levels: str) -> str:
        """Its course as a row of blocks, at most so many; empty where it has none. A long one takes a while, once."""
        if self.course is None:
            return ""
        if (width, levels) not in self._drawn:
            self._drawn[width, levels] = sparkline(self.course, width, levels)
        return self._drawn[width, levels]


def figures(run: Run, shards: Sequence[tuple[float, int]] = ()) -> list[Figure]:
    """Those that a person follows. `shards`: when how many of an encode job were seen to be done."""
    return _encode(run, shards) if run.found.kind == "encode" else _training(run)


def share_done(run: Run) -> float | None:
    """Of its steps, 0 to 1; None where nobody knows how many there are to be."""
    step, target = run.numbers.last_step, run.target
    return min(1.0, step / target) if step is not None and target else None


def seconds_left(run: Run) -> float | None:
    """By its pace since the last start; None where that is not known."""
    step, target, pace = run.numbers.last_step, run.target, run.pace
    if step is None or not target or step >= target or pace is None:
        return None
    return pace * (target - step)


def percent(share: float) -> str:
    """Rounded down: 100% is all of it."""
    return f"{math.floor(100 * share + 1e-9)}%"


def sparkline(course: Series, width: int, levels: str = BLOCKS) -> str:
    """A row of blocks; the few values far beyond the others are drawn as the highest or lowest."""
    values: NDArray[np.float64] = thinned(course, width).mean
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, high = np.quantile(finite, [0.02, 0.98])
    if high <= low:
        low, high = finite.min(), finite.max()
    scaled = (np.clip(values, low, high) - low) / ((high - low) or 1.0) * (len(levels) - 1)
    return "".join(levels[round(float(v))] if np.isfinite(v) else _GAP for v in scaled)


def _training(run: Run) -> list[Figure]:
    numbers = run.numbers
    found = [_of(run, "loss", "loss", lambda v: f"{v:.4f}" if 1e-3 < abs(v) < 1e4 else number(v))]
    held_out = [numbers.get(*key) for key in numbers.named("validation_loss")]
    if held_out and held_out[0] is not None:
        said = ", ".join(f"{one.key[-1]} {number(one.last)}" for one in held_out if one is not None)
        found.append(Figure("held out", f"{said} (step {held_out[0].steps[-1]:,})", held_out[0], short=False))
    found += [
        _of(run, "psnr_db", "PSNR", lambda v: f"{v:.1f} dB"),
        _of(run, "gradient_norm", "norm", number),
        _of(run, "learning_rate", "rate", lambda v: f"{v:.2e}"),
        _of(run, "images_per_second", "images/s", lambda v: f"{v:,.0f}" if v >= 100 else number(v)),
        _wait(run),
        _of(run, "epoch", "epoch", lambda v: f"{v:.2f}", short=False, has_course=False),
        _of(run, "resident_memory_bytes", "memory", lambda v: f"{v / 2**30:.1f} GiB", short=False, has_course=False),
    ]
    skipped = numbers.last("skipped_steps")
    found.append(Figure("skipped", f"{skipped:,.0f} steps", numbers.get("skipped_steps")) if skipped else None)
    return [figure for figure in found if figure is not None]


def _of(
    run: Run, key: str, name: str, said: Callable[[float], str], *, short: bool = True, has_course: bool = True
) -> Figure | None:
    course = run.numbers.get(key)
    if course is None:
        return None
    value = said(course.last) if np.isfinite(course.last) else "not finite"
    return Figure(name, value, course if has_course else None, short)


def _wait(run: Run) -> Figure | None:
    wait, step = run.numbers.get("data_wait_seconds"), run.numbers.get("step_seconds")
    if wait is None or step is None or len(wait.values) != len(step.values):
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        share = Series(wait.key, wait.steps, wait.times, wait.values / step.values)
    return Figure("wait", f"{share.last:.0%}" if np.isfinite(share.last) else "not finite", share)


def _encode(run: Run, shards: Sequence[tuple[float, int]]) -> list[Figure]:
    parts = run.encoded
    samples, rejected = sum(part.samples for part in parts), sum(sum(part.reasons[0].values()) for part in parts)
    found = [Figure("shards", f"{sum(part.tally.shards for part in parts):,}"), Figure("samples", f"{samples:,}")]
    if samples + rejected:
        commonest = [f"{reason} {count:,}" for part in parts for reason, count in list(part.reasons[0].items())[:3]]
        found.append(Figure("rejected", f"{rejected / (samples + rejected):.2%}"))
        found += [Figure("reasons", ", ".join(commonest[:4]), short=False)] if commonest else []
    found.append(Figure("size", in_units(sum(part.bytes for part in parts))))
    if len(shards) > 1:
        (first, few), (last, many) = shards[0], shards[-1]
        found.append(Figure("pace", f"{60 * (many - few) / max(last - first, 1e-9):,.1f} shards/min"))
    return found
