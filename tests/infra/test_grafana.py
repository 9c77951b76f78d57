"""The dashboards: in step with the metric table, valid for Grafana, and drawn without overlap."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from grafana_schema import Dashboard, GridPos, Row, Timeseries
from pydantic import ValidationError

from infra.grafana import generate
from pipeline.metrics import DEFINITIONS

FOLDER = Path(__file__).parents[2] / "infra/grafana"
FILES = sorted((FOLDER / "dashboards").glob("*.json"))


def test_checked_in_files_are_what_the_code_writes(tmp_path):
    assert generate.main([str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in FILES]
    for path in FILES:
        assert path.read_text() == (tmp_path / path.name).read_text(), "run python -m infra.grafana.generate"


def test_every_metric_is_on_a_dashboard_or_named_as_not():
    text = "".join(path.read_text() for path in FILES)
    shown = set(re.findall(r"\blathe_\w+", text)) - {"lathe_job"}
    known = {name: d.name(s) for d in DEFINITIONS for s in d.jobs for name in (*d.series(s), d.name(s))}
    assert shown <= set(known), "a name that the table does not have"
    on_dashboards = {known[name] for name in shown}
    assert on_dashboards.isdisjoint(generate.NOT_SHOWN), "shown, and named as not"
    assert on_dashboards | set(generate.NOT_SHOWN) == set(known.values())
    assert all(len(reason) > 10 for reason in generate.NOT_SHOWN.values())


def test_a_metric_that_is_forgotten_is_told(tmp_path, monkeypatch, capsys):
    more = (*DEFINITIONS, DEFINITIONS[0].__class__("forgotten", "1", "One more", ("train",)))
    monkeypatch.setattr(generate, "DEFINITIONS", more)
    assert generate.main([str(tmp_path)]) == 1
    assert "lathe_train_forgotten" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dashboards_are_valid(path):
    dashboard = Dashboard.model_validate_json(path.read_text())
    assert dashboard.uid == path.stem
    assert len({panel.id for panel in dashboard.panels}) == len(dashboard.panels)
    for panel in dashboard.panels:
        if not isinstance(panel, Row):
            assert len({target.ref_id for target in panel.targets}) == len(panel.targets)
            assert all("$run" in target.expr for target in panel.targets)
        if isinstance(panel, Timeseries):  # parts of one run are stacked, and not runs on one another
            is_stacked = panel.field_config.defaults.custom.stacking.mode != "none"
            assert (panel.repeat == "run") == is_stacked == ("$run" in panel.title)
    for one, other in combinations([panel.grid_pos for panel in dashboard.panels], 2):
        assert not overlap(one, other)
    assert all(panel.grid_pos.x + panel.grid_pos.w <= 24 for panel in dashboard.panels)


def overlap(one: GridPos, other: GridPos) -> bool:
    return (
        one.x < other.x + other.w and other.x < one.x + one.w and one.y < other.y + other.h and other.y < one.y + one.h
    )


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (("schemaVersion",), "36"),
        (("panels", 1, "gridPos", "w"), 25),
        (("panels", 1, "type"), "graph"),
        (("panels", 1, "targets", 0, "expr"), ""),
        (("panels", 1, "fieldConfig", "defaults", "unit"), "seconds"),
        (("templating", "list", 1, "unknown"), 1),
    ],
)
def test_the_schema_refuses_what_grafana_would_not_draw(place, change):
    tree = json.loads(FILES[0].read_text())
    inner = tree
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = change
    with pytest.raises(ValidationError):
        Dashboard.model_validate_json(json.dumps(tree))


def test_provisioning_files_name_what_there_is():
    provider = yaml.safe_load((FOLDER / "provisioning/dashboards/lathe.yml").read_text())
    (found,) = provider["providers"]
    assert provider["apiVersion"] == 1
    assert found["type"] == "file"
    assert found["options"]["path"].startswith("/")
    sources = yaml.safe_load((FOLDER / "provisioning/datasources/lathe.yml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    scraped = yaml.safe_load((FOLDER.parent / "prometheus/file-sd.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    for path in (FOLDER / "provisioning").rglob("*.yml"):
        assert "$" not in path.read_text(), "Grafana would take it for a variable of the environment"
