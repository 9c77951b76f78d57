"""What a thing on disk is, in a person's words and units, or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.operate.numerals import in_units

_WIDEST = 88  # characters of a line beside its name
_DEEPEST = 8  # lists in lists that are shown


class Size(int):
    """Bytes, which a person is shown in larger units."""


@dataclass(frozen=True)
class Section:
    """A table below the facts."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    more: int = 0  # rows that are not shown


@dataclass(frozen=True)
class Description:
    """One thing: facts by name, and tables. Values are numbers, text, `Size`, or lists and mappings of these."""

    kind: str
    url: str
    facts: dict[str, Any]
    sections: list[Section] = field(default_factory=list)

    def text(self) -> str:
        """Lines for a person; what came from outside has no control characters left."""
        lines = [f"{self.kind}  {_shown(self.url)}"]
        facts = {name: value for name, value in self.facts.items() if value not in ("", None, [], {})}
        width = max(map(len, facts), default=0)
        for name, value in facts.items():
            first, *rest = textwrap.wrap(_shown(value, 3 * _WIDEST), _WIDEST) or [""]
            lines.append(f"  {name.replace('_', ' '):<{width}}  {first}")
            lines += [f"  {'':<{width}}  {line}" for line in rest]
        for section in self.sections:
            if section.rows:
                lines += ["", f"  {section.title}", *_aligned(section)]
                lines += [f"    ... and {section.more:,} more"] if section.more else []
        return "\n".join(line.rstrip() for line in lines)

    def json(self) -> str:
        """The same for a program: bytes and counts as numbers, tables as lists of objects."""
        tables = {
            section.title.replace(" ", "_"): [dict(zip(section.columns, row, strict=True)) for row in section.rows]
            for section in self.sections
        }
        return json.dumps({"kind": self.kind, "url": self.url, **self.facts, **tables}, indent=1, default=str)


def _aligned(section: Section) -> list[str]:
    rows = [[_shown(value) for value in row] for row in section.rows]
    header = [name.replace("_", " ") for name in section.columns]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float) for row in section.rows) for i in range(len(header))]
    return [
        "    " + "  ".join(f"{cell:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row))
        for row in [header, *rows]
    ]


def _shown(value: Any, longest: int = _WIDEST, depth: int = 0) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, Size):
        return in_units(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if depth > _DEEPEST:
        return "..."
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {_shown(part, depth=depth + 1)}" for name, part in value.items())
    elif not isinstance(value, str):
        value = "  ".join(_shown(part, depth=depth + 1) for part in value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value[:longest])
    return text if len(value) <= longest else text[:-3] + "..."
