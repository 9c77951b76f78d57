"""Write the dashboards: `python -m infra.grafana.generate [FOLDER]`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.grafana.encoding import encoding
from infra.grafana.panels import Dashboard, rendered
from infra.grafana.training import first_stage, training
from pipeline.metrics import DEFINITIONS

FOLDER = Path(__file__).parent / "dashboards"
NOT_SHOWN: dict[str, str] = {}
"""Metrics of the table, by full name, that no dashboard shows, and why."""


def main(arguments: Sequence[str]) -> int:
    """Write every dashboard to the folder given, or to where they are kept; 1 = some metric is on none of them."""
    dashboards = [training(), first_stage(), encoding()]
    if forgotten := unshown(dashboards):
        print(f"error: on no dashboard: {', '.join(forgotten)}\n  add panels, or say why in NOT_SHOWN", file=sys.stderr)
        return 1
    folder = Path(arguments[0]) if arguments else FOLDER
    for dashboard in dashboards:
        path = folder / f"{dashboard.uid}.json"
        path.write_text(json.dumps(rendered(dashboard), indent=2) + "\n", encoding="utf-8")
    return 0


def unshown(dashboards: Sequence[Dashboard]) -> list[str]:
    """Metrics of the table that are neither on a dashboard nor named as not."""
    queries = [query for board in dashboards for row in board.rows for panel in row.panels for query in panel.queries]
    shown = {name for query in queries for name in re.findall(r"\blathe_\w+", query.expr)}
    return [
        definition.name(subject)
        for definition in DEFINITIONS
        for subject in definition.jobs
        if not shown & {*definition.series(subject)} and definition.name(subject) not in NOT_SHOWN
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
