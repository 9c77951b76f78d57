"""The two files of a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.operate.report.charts import Chart
from pipeline.operate.report.demo_page import page
from pipeline.operate.report.facts import ReportFacts


def write_report(folder: Path, facts: ReportFacts) -> None:
    """Write `report.html`, which needs nothing beside it, and `report.json` with the same numbers.

    Raises:
        StorageError: the folder cannot be written.
    """
    texts = {
        "report.html": page(facts),
        "report.json": json.dumps(numbers(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            temporary = folder / f"{name}.part"
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # in a name that is no UTF-8
            temporary.replace(folder / name)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror or error}", "give a folder with write access and space"
        ) from error


def numbers(facts: ReportFacts) -> dict[str, Any]:
    """The report's numbers as JSON values; what is missing, infinite or no number is None."""
    retrieval, reconstruction = facts.retrieval, facts.reconstruction
    tree = {
        "title": facts.title,
        "prompt_retrieval_top1": retrieval and retrieval.top1,
        "prompt_retrieval_top5": retrieval and retrieval.top5,
        "prompt_retrieval_candidates": retrieval and retrieval.candidates,
        "prompt_retrieval_prompts": retrieval and retrieval.prompts,
        "reconstruction_psnr_db": reconstruction and reconstruction.psnr_db,
        "reconstruction_psnr_nonwhite_db": reconstruction and reconstruction.psnr_nonwhite_db,
        "reconstruction_pictures": reconstruction and reconstruction.pictures,
        "unseen": [
            {"caption": u.caption, "kind": u.kind, "colour_delta_e": u.colour_delta_e, "shape_iou": u.shape_iou}
            for u in facts.unseen
        ],
        "generated": [{"prompt": g.prompt, "rank": g.rank} for g in facts.generated],
        "wall_seconds": facts.wall_seconds,
        "peak_rss_bytes": facts.peak_rss_bytes,
        "images_per_second": facts.images_per_second,
        "loss_charts": [_chart(chart) for chart in facts.loss_charts],
        "throughput_charts": [_chart(chart) for chart in facts.throughput_charts],
        "settings": facts.settings,
        "versions": facts.versions,
        "hardware": facts.hardware,
        "attribution": facts.attribution,
    }
    return {key: _plain(value) for key, value in tree.items()}


def _chart(chart: Chart) -> dict[str, Any]:
    curves = [{"name": c.name, "steps": c.steps, "values": c.values} for c in chart.curves]
    return {"title": chart.title, "unit": chart.unit, "curves": curves}


def _plain(value: Any) -> Any:
    """Mappings, sequences and numbers (numpy's among them) as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        return [_plain(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} is no JSON value")
