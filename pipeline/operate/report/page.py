"""The report's HTML page: one section per kind of fact, none for what is missing."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.operate.report.charts import figure
from pipeline.operate.report.facts import Chart, GeneratedPicture, Reconstruction, ReportFacts, UnseenPicture
from pipeline.operate.report.markup import Html, image, join, tag


def page(facts: ReportFacts) -> str:
    """The whole document. It loads nothing: style, script and pictures are inside it."""
    style, script = (
        Html((Path(__file__).parent / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")
    )
    # Only the style and the script that are ours run, even if a caption were to slip through unescaped.
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    sections = [section for section in _sections(facts) if section]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", facts.title),
        tag("style", style),
    )
    links = [tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title, _ in sections]
    header = tag(
        "header",
        tag("h1", facts.title),
        tag("p", facts.summary) if facts.summary else None,
        tag("nav", tag("ul", *links), aria_label="Sections"),
    )
    main = tag("main", *(_section(*section) for section in sections), id="main")
    footer = tag("footer", tag("p", _linked(facts.attribution)) if facts.attribution else None)
    skip = tag("a", "Skip to the numbers", href="#main", class_="skip")
    body = tag("body", skip, header, main, footer, tag("script", script))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _section(anchor: str, title: str, content: Html) -> Html:
    return tag("section", tag("h2", title, id=f"{anchor}-title"), content, id=anchor, aria_labelledby=f"{anchor}-title")


def _sections(facts: ReportFacts) -> Iterable[tuple[str, str, Html] | None]:
    """Anchor, heading and content of each section; None where there is nothing to tell."""
    yield ("numbers", "Numbers", numbers) if (numbers := _numbers(facts)) else None
    yield ("generated", "Generated pictures", _generated(facts.generated)) if facts.generated else None
    yield ("unseen", "Unseen captions", _unseen(facts.unseen)) if facts.unseen else None
    yield (
        ("reconstructions", "Reconstructions", _reconstructions(facts.reconstructions))
        if facts.reconstructions
        else None
    )
    yield ("data", "Data", _samples(facts)) if facts.samples else None
    yield ("losses", "Losses", losses) if (losses := _losses(facts.loss_charts)) else None
    yield ("throughput", "Throughput", throughput) if (throughput := _throughput(facts)) else None
    yield ("time", "Wall time", _times(facts.wall_seconds)) if facts.wall_seconds else None
    yield ("settings", "Settings", _settings(facts.settings)) if facts.settings else None
    yield ("versions", "Versions and hardware", versions) if (versions := _versions(facts)) else None


def _numbers(facts: ReportFacts) -> Html | None:
    cards = [*_retrieval_cards(facts), *_reconstruction_cards(facts), *_cost_cards(facts)]
    return tag("dl", *cards, class_="numbers") if cards else None


def _retrieval_cards(facts: ReportFacts) -> list[Html]:
    scores = facts.retrieval
    if scores is None:
        return []
    among = f"all {scores.candidates:,} training pictures"
    first = (
        f"Share of {scores.prompts:,} training captions for whose generated picture the nearest of {among},"
        " in latent space, is the caption's own."
    )
    five = f"Share whose own picture is among the nearest five of {among}."
    return [
        _card("Own picture nearest", number(scores.top1, 2), "", first, "prompt_retrieval_top1"),
        _card("Own picture among the nearest five", number(scores.top5, 2), "", five, "prompt_retrieval_top5"),
    ]


def _reconstruction_cards(facts: ReportFacts) -> list[Html]:
    scores = facts.reconstruction
    if scores is None:
        return []
    whole = f"Mean PSNR of {scores.pictures:,} {scores.of} after the autoencoder and back; higher is better."
    nonwhite = "The same over the pixels that are not white in the original: white background is easy."
    return [
        _card("Reconstruction", number(scores.psnr_db, 1), "dB", whole, "reconstruction_psnr_db"),
        _card("Without white", number(scores.psnr_nonwhite_db, 1), "dB", nonwhite, "reconstruction_psnr_nonwhite_db"),
    ]


def _cost_cards(facts: ReportFacts) -> list[Html]:
    cards = []
    if facts.wall_seconds:
        longest = max(facts.wall_seconds, key=lambda stage: facts.wall_seconds[stage])
        total = sum(facts.wall_seconds.values())
        meaning = (
            f"Wall time of {len(facts.wall_seconds)} stages; the longest was {longest},"
            f" {duration(facts.wall_seconds[longest])}."
        )
        cards.append(_card("Time", duration(total), "", meaning, "wall_seconds"))
    if facts.peak_rss_bytes is not None:
        meaning = "Largest resident memory of all processes of the run together."
        cards.append(_card("Memory", number(facts.peak_rss_bytes / 2**30, 1), "GiB", meaning, "peak_rss_bytes"))
    return cards


def _card(title: str, value: str, unit: str, meaning: str, key: str) -> Html:
    shown = tag("dd", value, tag("small", f" {unit}") if unit else None, class_="value")
    return tag(
        "div",
        tag("dt", title),
        shown,
        tag("dd", meaning, class_="meaning"),
        tag("dd", tag("code", key), class_="key"),
    )


def _pictures(figures: Iterable[Html]) -> Html:
    return tag("ul", *(tag("li", shown) for shown in figures), class_="pictures", role="list")


def _generated(pictures: Sequence[GeneratedPicture]) -> Html:
    paired = sum(picture.training_picture is not None for picture in pictures)
    if paired == 0:
        said = "Each made from its prompt alone."
    elif paired == len(pictures):
        said = "On the left the generated picture, on the right the training picture of that caption."
    else:
        said = "Each made from its prompt; of two together, the right one is the training picture of that caption."
    return join(tag("p", said), _pictures(map(_prompted, pictures)))


def _prompted(picture: GeneratedPicture) -> Html:
    generated = image(picture.pixels, f"generated for: {picture.prompt}")
    true = picture.training_picture
    rank = None
    if picture.rank is not None:
        said = "own picture nearest" if picture.rank == 1 else f"own picture ranks {picture.rank:,}"
        rank = tag("span", said, class_="score")
    shown = generated if true is None else tag("div", generated, image(true, "training picture"), class_="pair")
    return tag("figure", shown, tag("figcaption", picture.prompt, rank))


def _unseen(pictures: Sequence[UnseenPicture]) -> Html:
    said = (
        "Each word of these captions was trained on, but never together. On the left the generated picture, on the"
        " right the held-out one. Colour is the distance of mean colours in CIELAB, 0 where equal; shape is the overlap"
        " of the areas that are not white, 1 where equal."
    )
    return join(tag("p", said), _pictures(map(_unseen_picture, pictures)))


def _unseen_picture(picture: UnseenPicture) -> Html:
    pair = (image(picture.pixels, f"generated for: {picture.caption}"), image(picture.true_picture, "held-out picture"))
    scores = (
        f"new: {picture.kind}",
        f"colour {number(picture.colour_delta_e, 1)}, shape {number(picture.shape_iou, 2)}",
    )
    lines = (tag("span", line, class_="score") for line in scores)
    return tag("figure", tag("div", *pair, class_="pair"), tag("figcaption", picture.caption, *lines))


def _reconstructions(pictures: Sequence[Reconstruction]) -> Html:
    said = "Held-out pictures: above the original, below what the autoencoder makes of it."
    return join(tag("p", said), _pictures(map(_reconstructed, pictures)))


def _reconstructed(picture: Reconstruction) -> Html:
    pair = (image(picture.original, "original"), image(picture.reconstruction, "reconstruction"))
    score = None
    if picture.psnr_db is not None:
        score = tag("span", f"{number(picture.psnr_db, 1)} dB", class_="score")
    return tag("figure", tag("div", *pair, class_="pair above"), tag("figcaption", picture.caption, score))


def _samples(facts: ReportFacts) -> Html:
    shown = (tag("figure", image(s.pixels, ""), tag("figcaption", s.caption)) for s in facts.samples)
    return join(tag("p", "Some of the training pictures with their captions."), _pictures(shown))


def _charts(charts: Sequence[Chart], number_from: int) -> Html | None:
    drawn = [drawn for i, chart in enumerate(charts) if (drawn := figure(chart, number_from + i))]
    return tag("div", *drawn, class_="charts") if drawn else None


def _losses(charts: Sequence[Chart]) -> Html | None:
    said = "Pale: as logged. Strong: moving average. Pointer or arrow keys tell the values."
    return join(tag("p", said), drawn) if (drawn := _charts(charts, 0)) else None


def _throughput(facts: ReportFacts) -> Html | None:
    charts = _charts(facts.throughput_charts, len(facts.loss_charts))
    rates = [(stage, (number(rate, 1),)) for stage, rate in facts.images_per_second.items()]
    table = _table(("stage", "images per second, mean"), rates) if rates else None
    return join(table, charts) if table or charts else None


def _times(wall_seconds: Mapping[str, float]) -> Html:
    longest = max((s for s in wall_seconds.values() if s > 0 and math.isfinite(s)), default=1.0)
    rows = []
    for stage, seconds in wall_seconds.items():
        width = f"{100 * seconds / longest:.1f}%" if math.isfinite(seconds) else "0"
        bar = tag("svg", tag("rect", width=width, height="100%", rx=2), aria_hidden="true")
        rows.append(
            tag(
                "tr",
                tag("th", stage, scope="row"),
                tag("td", duration(seconds), class_="number"),
                tag("td", bar, class_="bar"),
            )
        )
    spent = tag("td", duration(sum(wall_seconds.values())), class_="number")
    total = tag("tr", tag("th", "all", scope="row"), spent, tag("td"))
    head = tag("tr", tag("th", "stage", scope="col"), tag("th", "time", scope="col", class_="number"), tag("td"))
    return tag("table", tag("thead", head), tag("tbody", *rows, total), class_="wide")


def _settings(settings: Mapping[str, str]) -> Html:
    said = "As each stage ran, every default written out."
    stages = (tag("details", tag("summary", stage), tag("pre", text, tabindex=0)) for stage, text in settings.items())
    return join(tag("p", said), *stages)


def _versions(facts: ReportFacts) -> Html | None:
    tables = []
    if facts.hardware:
        tables.append(tag("div", _table(("hardware", ""), [(k, (v,)) for k, v in facts.hardware.items()])))
    if facts.versions:
        tables.append(tag("div", _table(("package", "version"), [(k, (v,)) for k, v in facts.versions.items()])))
    return tag("div", *tables, class_="tables") if tables else None


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Html:
    heads = (tag("th", title, scope="col") if title else tag("td") for title in head)
    body = (tag("tr", tag("th", name, scope="row"), *(tag("td", value) for value in values)) for name, values in rows)
    return tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *body))


def _linked(text: str) -> Html:
    parts = re.split(r"(https://[^\s)<>\"]+[^\s)<>\".,;])", text)
    return join(*(tag("a", part, href=part) if i % 2 else part for i, part in enumerate(parts)))


def number(value: float, digits: int) -> str:
    """A number with that many decimals, or a dash where it is none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "\u2013"


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `1 h 5 min`, with spaces that do not break between number and unit."""
    if not math.isfinite(seconds):
        return "\u2013"
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if hours else f"{minutes}\u00a0min {rest}\u00a0s"
