"""The demo's page: one section per kind of fact, none for what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pipeline.operate.report.charts import charts
from pipeline.operate.report.document import Section, bars, card, document, listing, table
from pipeline.operate.report.facts import GeneratedPicture, Reconstruction, ReportFacts, UnseenPicture
from pipeline.operate.report.markup import Html, image, join, tag
from pipeline.operate.report.toolbar import toolbar


def page(facts: ReportFacts) -> str:
    """The whole document."""
    return document(facts.title, facts.summary, list(_sections(facts)), facts.attribution)


def _sections(facts: ReportFacts) -> Iterator[Section]:
    """Those that there is something to tell of."""
    found = (
        ("numbers", "Numbers", _numbers(facts)),
        ("generated", "Generated pictures", _generated(facts.generated) if facts.generated else None),
        ("unseen", "Unseen captions", _unseen(facts.unseen) if facts.unseen else None),
        (
            "reconstructions",
            "Reconstructions",
            _reconstructions(facts.reconstructions) if facts.reconstructions else None,
        ),
        ("data", "Data", _samples(facts) if facts.samples else None),
        ("losses", "Losses", charts(facts.loss_charts)),
        ("throughput", "Throughput", _throughput(facts)),
        ("time", "Wall time", _times(facts.wall_seconds) if facts.wall_seconds else None),
        ("settings", "Settings", _settings(facts.settings) if facts.settings else None),
        ("versions", "Versions and hardware", _versions(facts)),
    )
    yield from (
        Section(anchor, title, content, toolbar() if anchor == "losses" else None)
        for anchor, title, content in found
        if content
    )


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
        card("Own picture nearest", number(scores.top1, 2), "", first, "prompt_retrieval_top1"),
        card("Own picture among the nearest five", number(scores.top5, 2), "", five, "prompt_retrieval_top5"),
    ]


def _reconstruction_cards(facts: ReportFacts) -> list[Html]:
    scores = facts.reconstruction
    if scores is None:
        return []
    whole = f"Mean PSNR of {scores.pictures:,} {scores.of} after the autoencoder and back; higher is better."
    nonwhite = "The same over the pixels that are not white in the original: white background is easy."
    return [
        card("Reconstruction", number(scores.psnr_db, 1), "dB", whole, "reconstruction_psnr_db"),
        card("Without white", number(scores.psnr_nonwhite_db, 1), "dB", nonwhite, "reconstruction_psnr_nonwhite_db"),
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
        cards.append(card("Time", duration(total), "", meaning, "wall_seconds"))
    if facts.peak_rss_bytes is not None:
        meaning = "Largest resident memory of all processes of the run together."
        cards.append(card("Memory", number(facts.peak_rss_bytes / 2**30, 1), "GiB", meaning, "peak_rss_bytes"))
    return cards


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


def _throughput(facts: ReportFacts) -> Html | None:
    drawn = charts(facts.throughput_charts, len(facts.loss_charts))
    rates = [(stage, (number(rate, 1),)) for stage, rate in facts.images_per_second.items()]
    means = table(("stage", "images per second, mean"), rates) if rates else None
    return join(means, drawn) if means or drawn else None


def _times(wall_seconds: Mapping[str, float]) -> Html:
    longest = max((s for s in wall_seconds.values() if s > 0 and math.isfinite(s)), default=1.0)
    rows = [
        (stage, duration(seconds), seconds / longest if math.isfinite(seconds) else 0.0)
        for stage, seconds in wall_seconds.items()
    ]
    return bars(("stage", "time"), rows, ("all", duration(sum(wall_seconds.values()))))


def _settings(settings: Mapping[str, str]) -> Html:
    said = "As each stage ran, every default written out."
    return join(tag("p", said), *(listing(stage, text) for stage, text in settings.items()))


def _versions(facts: ReportFacts) -> Html | None:
    tables = []
    if facts.hardware:
        tables.append(tag("div", table(("hardware", ""), [(k, (v,)) for k, v in facts.hardware.items()])))
    if facts.versions:
        tables.append(tag("div", table(("package", "version"), [(k, (v,)) for k, v in facts.versions.items()])))
    return tag("div", *tables, class_="tables") if tables else None


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
