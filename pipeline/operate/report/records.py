"""What runs noted beside their numbers: run files and how they differ, data sets, versions, hardware."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import yaml

from pipeline import runfile
from pipeline.errors import DataError, StorageError
from pipeline.operate.model_contents import data_sets_of
from pipeline.operate.report.document import listing, table
from pipeline.operate.report.markup import Html, join, tag
from pipeline.operate.runs.find import KINDS
from pipeline.operate.runs.run import Run

_NOTHING = "\u2013"
_LONGEST = 200  # characters of a value in a table
_MOST_STARTS = 50
_OF_HARDWARE = ("device", "threads", "batch_size", "slicing", "compile")  # of what encode workers note


def settings_of(run: Run) -> dict[str, Any]:
    """What makes a run what it is: its run file, or what its latents mean."""
    if run.found.kind != "encode":
        return run.config
    return _of_parts({part.folder: part.settings() for part in run.encoded})


def _with_credentials(run: Run) -> dict[str, Any]:
    if run.found.kind != "encode":
        return run.with_credentials
    return _of_parts({part.folder: part.with_credentials() for part in run.encoded})


def _of_parts(parts: dict[str, Any]) -> dict[str, Any]:
    return parts[""] if set(parts) == {""} else parts


def differences(runs: Sequence[Run]) -> Html | None:
    """Settings that are not the same in all runs of a kind; None where there are no two of one."""
    groups = {kind: [run for run in runs if run.found.kind == kind] for kind in KINDS}
    is_mixed = len({run.found.kind for run in runs}) > 1
    parts = [
        join(tag("h3", KINDS[kind].capitalize()) if is_mixed else None, _differences(group))
        for kind, group in groups.items()
        if len(group) > 1
    ]
    return join(*parts) if parts else None


def _differences(runs: Sequence[Run]) -> Html:
    flat = [dict(_flat(settings_of(run))) for run in runs]
    if not all(flat):
        missing = ", ".join(run.name for run, found in zip(runs, flat, strict=True) if not found)
        return tag("p", f"Nothing can be compared: there is no run file of {missing}.")
    whole = [dict(_flat(_with_credentials(run))) for run in runs]
    fields = dict.fromkeys(name for found in flat for name in found)
    rows = [
        (name, _beside([found.get(name, _NOTHING) for found in flat], [found.get(name, _NOTHING) for found in whole]))
        for name in fields
        if len({found.get(name) for found in whole}) > 1
    ]
    if not rows:
        return tag("p", "The settings of all runs are the same.")
    said = f"Settings that are not the same in all runs; the other {len(fields) - len(rows)} are."
    return join(tag("p", said), table(("field", *(run.name for run in runs)), rows))


def _beside(shown: Sequence[str], whole: Sequence[str]) -> list[str]:
    """Values as they may be shown, and whether what was left out of them, as a password, is not the same."""
    hidden = len(set(shown)) < len(set(whole))
    return [f"{text} (some differ in what is left out)" if hidden else text for text in _cut_apart(shown)]


def configuration(runs: Sequence[Run]) -> Html | None:
    """The resolved settings of each run, folded away."""
    texts = [(run.name, _as_yaml(settings)) for run in runs if (settings := settings_of(run))]
    if not texts:
        return None
    said = "As it ran, every default written out; of the last start, where there were several."
    return join(tag("p", said), *(listing(name, text) for name, text in texts))


def data_sets(runs: Sequence[Run]) -> Html | None:
    """What each training was trained on, by its newest checkpoint."""
    columns: list[tuple[str, dict[str, str]]] = []
    for run in runs:
        steps = run.checkpoints if run.found.kind == "train" else {}
        if steps:
            # a damaged manifest is for `lathe inspect` to tell; a checkpoint may be deleted meanwhile
            with suppress(DataError, StorageError):
                section = data_sets_of(run.found.store, f"step-{max(steps):08d}")
                for row in section.rows:
                    facts = zip(section.columns, row, strict=True)
                    columns.append((run.name, {name: _said(value) for name, value in facts if value is not None}))
    return _beside_each_other(columns) if columns else None


def environment(runs: Sequence[Run]) -> Html | None:
    """Versions and hardware, as each run noted them, and its starts where there were several."""
    noted = [(run.name, *found) for run in runs for found in _environments(run)]
    tables = [
        tag("div", tag("h3", title), _beside_each_other(columns))
        for title, columns in (
            ("Hardware", [(name, hardware) for name, hardware, _ in noted]),
            ("Versions", [(name, versions) for name, _, versions in noted]),
        )
        if any(facts for _, facts in columns)
    ]
    starts = [join(tag("h3", f"Starts of {run.name}"), _starts(run)) for run in runs if len(run.starts) > 1]
    return join(tag("div", *tables, class_="tables"), *starts) if tables else None


def _beside_each_other(columns: Sequence[tuple[str, Mapping[str, str]]]) -> Html:
    """A column for each run, a row for each of their facts."""
    fields = dict.fromkeys(field for _, facts in columns for field in facts)
    rows = [(field.replace("_", " "), [_cut(facts.get(field, _NOTHING)) for _, facts in columns]) for field in fields]
    return table(("", *(name for name, _ in columns)), rows)


def _environments(run: Run) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Hardware and versions: of a training its last start's; of an encode job those of all workers that differ."""
    if run.found.kind == "encode":
        found = [{k: str(v) for k, v in made.items() if v != ""} for part in run.encoded for made in part.environments]
        return [
            (
                {k: v for k, v in one.items() if k in _OF_HARDWARE},
                {k: v for k, v in one.items() if k not in _OF_HARDWARE},
            )
            for one in found
        ]
    if not run.starts:
        return []
    last = {key: value for key, value in run.starts[-1].items() if key not in ("time", "step")}
    versions = last.pop("versions", {})
    facts = {name.replace("memory_gib", "memory, GiB"): value for name, value in _flat(last, prefix=False)}
    return [(facts, dict(_flat(versions)) if isinstance(versions, dict) else {})]


def _starts(run: Run) -> Html:
    shown = run.starts[-_MOST_STARTS:]
    rows = []
    before: Mapping[str, Any] = {}
    for start in shown:
        noted = start.get("versions")
        versions: Mapping[str, Any] = noted if isinstance(noted, dict) else {}
        changed = [f"{k} {v}" for k, v in versions.items() if before and before.get(k) != v]
        before = versions
        rows.append(
            (
                _moment(start.get("time")),
                [str(start.get(k, "")) for k in ("step", "world_size", "device")] + [", ".join(changed)],
            )
        )
    said = tag("p", f"The last {_MOST_STARTS} of {len(run.starts)}.") if len(run.starts) > len(shown) else None
    return join(said, table(("time", "from step", "ranks", "device", "other versions"), rows))


def _moment(seconds: Any) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(seconds)))
    except (TypeError, ValueError, OverflowError, OSError):
        return "\u2013"


def _flat(tree: Mapping[str, Any], above: str = "", *, prefix: bool = True) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        path = f"{above}{name}" if prefix else str(name)
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}.", prefix=prefix)
        else:
            yield path, _said(value)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else runfile.in_line(value)


def _cut_apart(texts: Sequence[str]) -> list[str]:
    """Texts that are not all the same, cut so that this is seen: around the place where they part, if it is far in."""
    alike = next(
        (i for i, all_of in enumerate(zip(*texts, strict=False)) if len(set(all_of)) > 1), min(map(len, texts))
    )
    start = max(0, alike - _LONGEST // 2)
    shown = [_cut("..." * (start > 0) + text[start:]) if len(text) > _LONGEST else text for text in texts]
    hidden = len(set(shown)) < len(set(texts))
    return [f"{text} (some differ further on)" for text in shown] if hidden else shown


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _as_yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, width=110, allow_unicode=True)
