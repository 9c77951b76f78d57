"""Figures for a person: aligned in the terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Rows = list[list[str]]


def aligned(rows: Rows) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Rows) -> str:
    """A table whose first row is its head."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def setting_rows(setting: dict[str, Any]) -> Rows:
    """Machine and versions, see `setting`."""
    facts = {name.replace("_", " "): str(value) for name, value in setting.items() if name != "packages"}
    return [[name, value] for name, value in (facts | setting["packages"]).items()]


def listed(values: Iterable[float]) -> str:
    """Three places of each."""
    return ", ".join(f"{value:.3f}" for value in values)


def passed(is_so: bool) -> str:
    """How a goal was met."""
    return "passed" if is_so else "MISSED"
