"""A page as one file: style, script and pictures are inside it, and nothing else would be loaded."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.operate.report.markup import Html, join, tag

GENERATOR = "lathe"
_STYLES = ("page.css", "chart.css")
_SCRIPTS = ("axis.js", "lines.js", "reading.js", "chart.js", "page.js")


class Section(NamedTuple):
    """A part of a page."""

    anchor: str
    title: str
    content: Html
    above: Html | None = None  # stands before it, and for all below it


def document(title: str, summary: Html | str, sections: Sequence[Section], footer: str = "") -> str:
    """The whole document.

    Args:
        title: plain text.
        summary: a line or two below it.
        sections: in order; each has a link at the top.
        footer: plain text, in which addresses become links.
    """
    style, script = (Html("".join(map(_asset, names))) for names in (_STYLES, _SCRIPTS))
    # Only the style and the script that are ours run, even if a caption were to slip through unescaped.
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=GENERATOR),
        tag("title", title),
        tag("style", style),
    )
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    header = tag(
        "header",
        tag("h1", title),
        tag("p", summary) if summary else None,
        tag("nav", tag("ul", *links), aria_label="Sections") if links else None,
    )
    main = tag("main", *(part for section in sections for part in (section.above, _section(section))), id="main")
    below = tag("footer", tag("p", _linked(footer)) if footer else None)
    skip = tag("a", "Skip to the numbers", href="#main", class_="skip")
    body = tag("body", skip, header, main, below, tag("script", script))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def table(
    head: Sequence[str],
    rows: Iterable[tuple[Html | str, Sequence[Html | str]]],
    *,
    numbers: bool = False,
    kind: str = "",
) -> Html:
    """A table with a name in front of each row; `numbers` aligns the rest to the right. It scrolls where it is wide."""
    class_ = "number" if numbers else None
    heads = (
        tag("th", title, scope="col", class_=class_ if place else None) if title else tag("td")
        for place, title in enumerate(head)
    )
    body = (
        tag("tr", tag("th", name, scope="row"), *(tag("td", value, class_=class_) for value in values))
        for name, values in rows
    )
    whole = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))
    return tag(
        "div",
        whole,
        class_=f"scroll {kind}".strip(),
        tabindex=0,
        role="group",
        aria_label=f"table: {', '.join(filter(None, head))}",
    )


def listing(title: Html | str, text: str) -> Html:
    """Text as it is, folded away below its title."""
    return tag("details", tag("summary", title), tag("pre", text, tabindex=0))


def bars(head: tuple[str, str], rows: Sequence[tuple[str, str, float]], total: tuple[str, str] | None = None) -> Html:
    """Names and values with a bar each, of a length between 0 and 1, and a last row without one."""
    lines = []
    for name, value, share in rows:
        bar = tag("svg", tag("rect", width=f"{100 * share:.1f}%", height="100%", rx=2), aria_hidden="true")
        lines.append(
            tag("tr", tag("th", name, scope="row"), tag("td", value, class_="number"), tag("td", bar, class_="bar"))
        )
    if total:
        lines.append(tag("tr", tag("th", total[0], scope="row"), tag("td", total[1], class_="number"), tag("td")))
    first, second = head
    top = tag("tr", tag("th", first, scope="col"), tag("th", second, scope="col", class_="number"), tag("td"))
    return tag("table", tag("thead", top), tag("tbody", *lines), class_="wide")


def card(title: str, value: str, unit: str, meaning: str, key: str = "") -> Html:
    """One number in large figures, and what it means; `key` is its name elsewhere."""
    shown = tag("dd", value, tag("small", f" {unit}") if unit else None, class_="value")
    named = tag("dd", tag("code", key), class_="key") if key else None
    return tag("div", tag("dt", title), shown, tag("dd", meaning, class_="meaning"), named)


def _section(section: Section) -> Html:
    heading = f"{section.anchor}-title"
    return tag(
        "section",
        tag("h2", section.title, id=heading),
        section.content,
        id=section.anchor,
        aria_labelledby=heading,
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _linked(text: str) -> Html:
    parts = re.split(r"(https://[^\s)<>\"]+[^\s)<>\".,;])", text)
    return join(*(tag("a", part, href=part) if i % 2 else part for i, part in enumerate(parts)))
