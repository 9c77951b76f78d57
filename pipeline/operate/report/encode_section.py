"""What encode jobs made: samples by bucket, statistics, what was left out and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipeline.operate.numerals import number
from pipeline.operate.record_contents import describe_manifest
from pipeline.operate.report.document import bars, table
from pipeline.operate.report.markup import Html, join, tag
from pipeline.operate.runs.encoded import Encoded
from pipeline.operate.runs.run import Run


def encode_section(runs: Sequence[Run]) -> Html | None:
    """All resolutions of all jobs; None where there is no job."""
    parts = [(run, part) for run in runs for part in run.encoded]
    shown = []
    for run, part in parts:
        title = " ".join(filter(None, [run.name if len(runs) > 1 else "", part.folder and f"{part.folder} px"]))
        shown.append(join(tag("h3", title) if title else None, *_about(part, "h4" if title else "h3")))
    return join(*shown) if shown else None


def _about(part: Encoded, heading: str) -> Iterator[Html]:
    rejected, filtered = part.reasons
    seen = part.samples + sum(rejected.values()) + sum(filtered.values())
    if part.manifest is None:
        yield tag("p", "There is no manifest of all shards yet: this is what the receipts of stored shards tell.")
    counts = f"Of {seen:,} samples {part.samples:,} were encoded, {part.holdout:,} of them to be held out."
    yield tag("p", counts)
    yield (
        _reasons(heading, "Rejected: could not be used", rejected, seen)
        if rejected
        else tag("p", "No sample was rejected.")
    )
    if filtered:
        yield _reasons(heading, "Left out: filtered, or taken down", filtered, seen)
    if examples := part.examples:
        rows = [(one["key"], [one["reason"], one["shard"]]) for one in examples]
        listed = table(("key", "reason", "shard"), rows)
        yield tag(
            "details",
            tag("summary", f"the first {len(rows)} samples that were left out"),
            tag("div", listed, class_="inside"),
        )
    if part.manifest is not None:
        yield from _of_manifest(part, heading)


def _reasons(heading: str, title: str, reasons: Mapping[str, int], seen: int) -> Html:
    most = max(reasons.values())
    rows = [
        (name.replace("_", " "), f"{count:,} ({count / seen:.2%})", count / most) for name, count in reasons.items()
    ]
    return join(tag(heading, title), bars(("reason", "samples"), rows))


def _of_manifest(part: Encoded, heading: str) -> Iterator[Html]:
    assert part.manifest is not None  # noqa: S101  asked by the caller
    manifest = part.manifest
    described = describe_manifest("", manifest)
    for section in described.sections:
        if section.rows and section.title in ("buckets", "text towers"):
            head = [name.replace("_", " ") for name in section.columns]
            rows = [
                (str(row[0]), [f"{v:,}" if isinstance(v, int) else str(v) for v in row[1:]]) for row in section.rows
            ]
            yield join(tag(heading, section.title.capitalize()), table(head, rows, numbers=True))
    channels = zip(manifest.mean, manifest.std, strict=True)
    rows = [(str(i), [number(mean), number(std)]) for i, (mean, std) in enumerate(channels)]
    yield join(tag(heading, "Latents by channel"), table(("channel", "mean", "standard deviation"), rows, numbers=True))
    if manifest.attribution:
        yield tag("p", f"Attribution: {manifest.attribution}")
