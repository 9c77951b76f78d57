"""Sheets of pictures over the steps of runs, few and small enough for a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data import images
from pipeline.errors import SetupError, StorageError
from pipeline.operate.report.markup import Html, data_url, join, tag
from pipeline.operate.runs.run import Run
from pipeline.storage import Entry

_MOST_SHEETS = 40  # of a run
_WIDEST, _TALLEST = 1600, 16_000  # pixels; a JPEG has at most 65,500
_AS_IT_IS, _QUALITY = 200 << 10, 85  # bytes of a PNG that is kept; quality of the others
_BUDGET = 32 << 20  # bytes of a page
_MAGNIFIED_BELOW = 1000  # pixels of width
_READ_AT_MOST = 256 << 20


@dataclass
class _Sheets:
    """What is shown of a run."""

    run: Run
    shown: list[Html]
    steps: list[int]
    note: str


def album(runs: Sequence[Run]) -> Html | None:
    """The sheets of all runs under one slider; None where there are none."""
    having = [run for run in runs if run.sheets]
    if not having:
        return None
    parts = [_sheets(run, _BUDGET // len(having), alone=len(having) == 1) for run in having]
    parts = [part for part in parts if part.steps]
    steps = sorted({step for part in parts for step in part.steps})
    if not steps:
        return tag("p", "None of the sheets of pictures can be read.")
    last = len(steps) - 1
    slide = tag(
        "div",
        tag("label", "Step", for_="album-step"),
        tag("input", type="range", id="album-step", min=0, max=last, value=last),
        tag("output", f"step {steps[-1]:,}", for_="album-step"),
        tag("button", "play", type="button"),
        class_="slide",
    )
    said = "The same prompts from the same noise at each validation, by the first of the validated weights."
    listed = [_prompts(part.run) for part in parts]
    alike = all(one == listed[0] for one in listed)
    figures = (
        _figure(part, part.run.name if len(runs) > 1 else "", [] if alike and number else prompts)
        for number, (part, prompts) in enumerate(zip(parts, listed, strict=True))
    )
    return join(tag("p", said), tag("div", slide, *figures, class_="album", data_steps=json.dumps(steps)))


def _sheets(run: Run, budget: int, *, alone: bool) -> _Sheets:
    chosen = evenly(run.sheets, _MOST_SHEETS)
    files: list[tuple[int, bytes, str]] = []
    unreadable = 0
    for step, entry in chosen:
        file = _file(run, entry)
        if file is None:
            unreadable += 1
        else:
            files.append((step, *file))
    while len(files) > 2 and sum(len(data) for _, data, _ in files) > budget:
        files = files[::2] if len(files) % 2 else [*files[:-1:2], files[-1]]
    label = "" if alone else f" of {run.name}"
    shown = [
        tag(
            "img",
            src=data_url(data, kind),
            alt=f"pictures{label} after step {step:,}",
            data_step=step,
            hidden=None if place == len(files) - 1 else "",
            **_size(data),
        )
        for place, (step, data, kind) in enumerate(files)
    ]
    count = len(run.sheets)
    evened = ", evenly chosen" if len(files) + unreadable < count else ""
    note = f"{len(files)} of {count} sheets are shown{evened}." if len(files) < count else ""
    if unreadable:
        note = f"{note} {unreadable} cannot be read."
    if any(kind == "jpeg" for _, _, kind in files):
        note = f"{note} Large ones are scaled down and stored as JPEG.".strip()
    return _Sheets(run, shown, [step for step, _, _ in files], note)


def _figure(part: _Sheets, name: str, prompts: Sequence[str]) -> Html:
    of_step = tag("span", f"step {part.steps[-1]:,}", class_="of-step")
    note = tag("p", part.note) if part.note else None
    about = tag("figcaption", tag("strong", f"{name} ") if name else None, of_step, note)
    listed = tag("ol", *(tag("li", prompt) for prompt in prompts), class_="prompts") if prompts else None
    return tag("figure", about, tag("div", *part.shown, class_="scroll"), listed)


def _prompts(run: Run) -> list[str]:
    validation = run.config.get("validation")
    prompts = validation.get("prompts") if isinstance(validation, dict) else None
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _file(run: Run, entry: Entry) -> tuple[bytes, str] | None:
    """A sheet as a page has it, and its kind; None where it is no picture."""
    if entry.size > _READ_AT_MOST:
        return None
    try:
        data = run.found.store.read(entry.name)
        pixels = images.decode(data)
    except (StorageError, images.ImageError, SetupError):
        return None
    height, width = pixels.shape[:2]
    scale = min(1.0, _WIDEST / width, _TALLEST / height)
    if scale == 1.0 and len(data) <= _AS_IT_IS and data.startswith(b"\x89PNG"):
        return data, "png"
    if scale < 1.0:
        pixels = images.cover(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))
    return images.jpeg(pixels, _QUALITY), "jpeg"


def _size(data: bytes) -> dict[str, int]:
    """Width and height on the page: small sheets at twice their size, pixel for pixel."""
    height, width = images.probe(data)
    scale = 2 if width < _MAGNIFIED_BELOW else 1
    return {"width": width * scale, "height": height * scale}


def evenly(sheets: Sequence[tuple[int, Entry]], most: int) -> list[tuple[int, Entry]]:
    """At most so many, the first and the last among them."""
    if len(sheets) <= most:
        return list(sheets)
    return [sheets[round(i * (len(sheets) - 1) / (most - 1))] for i in range(most)]
