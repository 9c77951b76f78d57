"""The page of runs: whole, escaped, small, and plain about what is missing."""

from __future__ import annotations

import ast
import json
import math
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from page_reader import Reader
from run_folders import NOW, log_lines, write_encoded, write_log, write_receipts, write_training

from pipeline import memory, train
from pipeline.data import images
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.operate.report import pictures, records
from pipeline.operate.report.job import report
from pipeline.operate.report.plans import PLANNED
from pipeline.operate.report.records import _cut_apart
from pipeline.operate.report.toolbar import Axis, toolbar
from pipeline.operate.runs.find import find, list_run
from pipeline.operate.runs.run import open_runs
from pipeline.storage import open_store

HOSTILE = "</figcaption><script>alert(1)</script> & \"quoted\" 'too'"


def page_of(tmp_path: Path, *folders: Path) -> Reader:
    said = report([str(folder) for folder in folders], str(tmp_path / "page.html"))
    assert said.startswith(f"{tmp_path}/page.html: ")
    return Reader((tmp_path / "page.html").read_text())


def chart(reader: Reader, title: str) -> dict[str, object]:
    found = [json.loads(a["data-chart"]) for a in reader.all("figure") if "data-chart" in a]
    return next(one for one in found if one["title"] == title)


def test_a_training_has_all_its_sections(tmp_path):
    reader = page_of(tmp_path, write_training(tmp_path / "run"))
    sections = [a["id"] for a in reader.all("section")]
    assert sections == [
        "overview",
        "losses",
        "levels",
        "pictures",
        "optimisation",
        "throughput",
        "configuration",
        "environment",
    ]
    for said in ("finished", "60 of 60", "an abacus", "2.14.1", "a red <apple>", "learning_rate: 0.001"):
        assert said in reader.text, said
    loss = chart(reader, "Loss")
    assert [curve["name"] for curve in loss["curves"]] == ["training", "held out, main", "held out, raw"]
    assert loss["curves"][0]["x"] == list(range(1, 61))
    by_level = chart(reader, "Loss by noise level, held out, main")
    assert [curve["name"] for curve in by_level["curves"]] == ["0.10 to 0.50", "0.50 to 0.90", "0.90 to 1.00"]
    assert chart(reader, "Data wait")["curves"][0]["mean"][0] == pytest.approx(10.0)
    album = next(a for a in reader.all("div") if a.get("class") == "album")
    assert json.loads(album["data-steps"]) == [10, 20, 30, 40, 50, 60]
    shown = [a for a in reader.all("img") if "hidden" not in a]
    assert [a["data-step"] for a in shown] == ["60"]


def test_runs_stand_beside_each_other(tmp_path):
    first = write_training(tmp_path / "a", global_batch=8)
    second = write_training(tmp_path / "b", scale=2.0, global_batch=16)
    reader = page_of(tmp_path, first, second)
    names = [curve["name"] for curve in chart(reader, "Loss")["curves"]]
    assert names[:2] == ["a training", "a held out, main"]
    assert "b training" in names
    assert [a["data-run"] for a in reader.all("button") if "data-run" in a] == ["0", "1"]
    differences = reader.text[reader.text.index("Settings that are not the same") :]
    assert "global_batch" in differences
    assert "optimizer.learning_rate" not in differences.partition("Configuration")[0]
    runs = json.loads(next(a["data-runs"] for a in reader.all("div") if "data-runs" in a))
    assert [run["samples"] for run in runs] == [8.0, 8.0]
    assert runs[0]["hours"][-1] == pytest.approx(59 / 3600, abs=1e-4)


def test_kinds_are_drawn_apart(tmp_path):
    write_log(tmp_path / "vae", [{"step": s, "time": NOW, "loss": 5.0, "reconstruction_loss": 5.0} for s in (1, 2)])
    reader = page_of(tmp_path, write_training(tmp_path / "run"), tmp_path / "vae", write_encoded(tmp_path / "latents"))
    losses = [json.loads(a["data-chart"]) for a in reader.all("figure") if '"Loss"' in a.get("data-chart", "")]
    assert [{curve["run"] for curve in one["curves"]} for one in losses] == [{0}, {1}]
    assert "differences" not in [a["id"] for a in reader.all("section")]


def test_the_same_weights_are_compared(tmp_path):
    write_log(tmp_path / "ema", log_lines(20))
    raw = log_lines(20)
    for line in raw:
        for metric in ("validation_loss", "validation_level_loss"):
            if metric in line:
                line[metric].pop("main")
    write_log(tmp_path / "raw", raw)
    reader = page_of(tmp_path, tmp_path / "ema", tmp_path / "raw")
    profiles = chart(reader, "Loss over the noise level, held out")["curves"]
    assert [curve["name"] for curve in profiles] == ["ema, step 20", "raw, step 20"]
    assert profiles[0]["mean"] == profiles[1]["mean"]
    assert "Held-out loss, raw" in reader.text
    assert "Held-out loss, main" not in reader.text


def test_weights_that_runs_do_not_share_are_named(tmp_path):
    for name in ("main", "other"):
        levels = {name: {"0_0.10-0.50": 1.0, "1_0.50-0.90": 2.0}}
        lines = [{"step": 1, "time": NOW, "validation_loss": {name: 1.5}, "validation_level_loss": levels}]
        write_log(tmp_path / name, lines)
    reader = page_of(tmp_path, tmp_path / "main", tmp_path / "other")
    profiles = chart(reader, "Loss over the noise level, held out")["curves"]
    assert [curve["name"] for curve in profiles] == ["main, main, step 1", "other, other, step 1"]
    assert "Held-out loss, main" in reader.text
    assert "Held-out loss, other" in reader.text


def test_runs_are_compared_with_those_of_their_kind(tmp_path):
    runs = [write_training(tmp_path / name, global_batch=batch) for name, batch in (("a", 8), ("b", 16))]
    reader = page_of(tmp_path, *runs, write_encoded(tmp_path / "latents"), write_encoded(tmp_path / "others"))
    told = reader.text[reader.text.index("Settings that are not the same") :].partition("Configuration")[0]
    assert "global_batch" in told
    assert "The settings of all runs are the same." in told


def test_long_values_are_cut_around_what_differs(tmp_path):
    long, same = "x" * 600, "y" * 600
    runs = [write_training(tmp_path / name, note=f"{long}{name}{same}", same=same) for name in ("one", "two")]
    told = page_of(tmp_path, *runs).text.partition("Settings that are not the same")[2].partition("Configuration")[0]
    assert "xone" in told
    assert "xtwo" in told
    assert len(told) < 1000
    assert _cut_apart([long, long + "one", long + "two"])[1:] == [f"...{'x' * 100}one", f"...{'x' * 100}two"]
    hidden = _cut_apart(["short", long + "one", long + "two"])
    assert hidden[0] == "short (some differ further on)"


def test_what_is_left_out_of_addresses_is_compared(tmp_path):
    addresses = [f"https://me:{secret}@host/model?version={secret}" for secret in ("one", "two")]
    runs = [write_training(tmp_path / name, model=url) for name, url in zip("ab", addresses, strict=True)]
    whole = page_of(tmp_path, *runs)
    told = whole.text.partition("Settings that are not the same")[2].partition("Configuration")[0]
    assert told.count("https://***@host/model (some differ in what is left out)") == 2
    assert "version" not in (tmp_path / "page.html").read_text().partition("</style>")[2].partition("Versions")[0]


def test_a_loss_that_is_none_at_the_end_is_not_hidden(tmp_path):
    lines = [{"step": s, "time": NOW + s, "loss": 0.5 if s <= 50 else None} for s in range(1, 101)]
    write_log(tmp_path / "run", lines)
    text = page_of(tmp_path, tmp_path / "run").text
    assert "Loss\u2013Mean of the last twentieth of the log; 5 of its 5 are not finite." in text
    write_log(tmp_path / "run", lines[:51])
    assert (
        "Loss0.5Mean of the last twentieth of the log; 1 of its 2 are not finite."
        in page_of(tmp_path, tmp_path / "run").text
    )


def test_headings_leave_no_level_out(tmp_path):
    latents, run = write_encoded(tmp_path / "latents"), write_training(tmp_path / "run")
    write_log(tmp_path / "vae", [{"step": s, "time": NOW, "loss": 5.0, "reconstruction_loss": 5.0} for s in (1, 2)])
    write_encoded(tmp_path / "sizes" / "256")
    for runs in ([latents], [run], [run, latents], [run, tmp_path / "vae"], [tmp_path / "sizes", latents]):
        levels = [int(name[1]) for name, _ in page_of(tmp_path, *runs).elements if name in ("h1", "h2", "h3", "h4")]
        assert all(below - above <= 1 for above, below in pairwise(levels))
    mixed = page_of(tmp_path, run, tmp_path / "vae")
    assert len(mixed.all("h4")) == len([a for a in mixed.all("figure") if "data-chart" in a])


def test_a_checkpoint_that_was_deleted_meanwhile_ends_no_report(tmp_path, monkeypatch):
    folder = write_training(tmp_path / "run")
    (folder / "run.yaml").unlink()
    (folder / "step-00000060" / "config.yaml").write_text("steps: 60")
    listing = list_run(open_store(str(folder)))
    rmtree(folder / "step-00000060")
    run = open_runs([find(str(folder))])[0]
    run.refresh(listing=listing)
    assert (run.config, run.numbers.last_step) == ({}, 60)
    assert records.data_sets([run]) is None


def test_an_encode_job_tells_what_was_left_out(tmp_path):
    reader = page_of(tmp_path, write_encoded(tmp_path / "latents"))
    for said in ("Of 21 samples 12 were encoded, 3 of them to be held out.", "no caption", "6 (28.57%)", "min side"):
        assert said in reader.text, said
    assert "the first 9 samples that were left out" in reader.text
    assert "0-small" in reader.text
    assert [a["id"] for a in reader.all("section")] == ["overview", "encoding", "configuration", "environment"]
    unfinished = page_of(tmp_path, write_receipts(tmp_path / "begun", [0]))
    assert "no manifest of all shards yet" in unfinished.text


def test_what_is_missing_is_said(tmp_path):
    write_log(tmp_path / "bare", [{"step": 1, "loss": None}, {"step": 2, "loss": None}])
    with (tmp_path / "bare" / "metrics.jsonl").open("a") as file:
        file.write("torn\n")
    reader = page_of(tmp_path, tmp_path / "bare")
    for said in (
        "damaged lines of its log, left out: 1",
        "2 of 2 logged losses are not finite",
        "its run file is not there",
        "versions and hardware were not noted",
    ):
        assert said in reader.text, said
    assert chart(reader, "Loss")["curves"][0]["mean"] == [None, None]
    write_log(tmp_path / "empty", [])
    empty = page_of(tmp_path, tmp_path / "empty")
    assert "its log has no line yet" in empty.text
    assert [a["id"] for a in empty.all("section")] == ["overview"]


def test_every_text_is_escaped(tmp_path):
    folder = write_training(tmp_path / "run", note=HOSTILE, validation={"prompts": [HOSTILE]})
    lines = log_lines(20)
    for line in lines:
        line |= {HOSTILE: 1.0, "validation_loss": {HOSTILE: 1.0}, "validation_level_loss": {HOSTILE: {HOSTILE: 1.0}}}
    write_log(folder, lines)
    (folder / "starts.json").write_text(json.dumps([{"step": HOSTILE, "versions": {HOSTILE: HOSTILE}}] * 2))
    text = report([str(folder)], str(tmp_path / "page.html")) and (tmp_path / "page.html").read_text()
    assert "<script>alert" not in text
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    assert reader.text.count(HOSTILE) >= 6


def test_names_that_are_no_utf8_are_shown_as_they_are_escaped(tmp_path):
    latents = write_encoded(tmp_path / "latents")
    with (latents / "rejects.jsonl").open("a") as file:
        file.write(json.dumps({"shard": "00000.tar", "key": "caf\udce9", "reason": "no_caption"}) + "\n")
    write_log(tmp_path / "run", [{"step": 1, "time": NOW, "loss": 1.0, "validation_loss": {"half \ud800": 1.0}}])
    reader = page_of(tmp_path, latents, tmp_path / "run")
    assert "caf\\udce9" in reader.text
    assert "half \\ud800" in reader.text


def test_a_long_run_makes_a_small_page(tmp_path):
    write_log(tmp_path / "long", log_lines(4_000))
    reader = page_of(tmp_path, tmp_path / "long")
    loss = chart(reader, "Loss")["curves"][0]
    assert len(loss["x"]) == 1000
    assert loss["lines"] == 4.0
    assert "Each point stands for 4 lines of the log" in reader.text
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


def test_numbers_without_a_place_are_drawn_too(tmp_path):
    write_log(tmp_path / "run", [{"step": s, "time": NOW, "loss": 1.0, "novel": float(s)} for s in range(1, 4)])
    assert chart(page_of(tmp_path, tmp_path / "run"), "Novel")["curves"][0]["mean"] == [1.0, 2.0, 3.0]


def test_every_planned_number_is_one_that_some_job_logs():
    """Else a reader would take the curve's absence for good news."""
    logged = set()
    for file in [*Path(train.__file__).parent.glob("*.py"), Path(memory.__file__)]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):  # what is only `metrics.set` stands in none
                logged |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                logged |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "note":
                logged |= {one.value for one in node.args if isinstance(one, ast.Constant)}
    assert logged >= PLANNED


def test_a_sheet_that_is_no_picture_is_passed_over(tmp_path):
    folder = write_training(tmp_path / "run")
    (folder / "samples" / "step-00000060.png").write_bytes(b"no picture")
    reader = page_of(tmp_path, folder)
    assert "5 of 6 sheets are shown. 1 cannot be read." in reader.text


def test_large_and_many_sheets_are_made_small_and_few(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_MOST_SHEETS", 3)
    monkeypatch.setattr(pictures, "_AS_IT_IS", 10_000)
    folder = write_training(tmp_path / "run", 10)
    noise = images.np.random.default_rng(0).integers(0, 256, (4, 1800, 3), dtype="uint8")
    for step in range(20, 70, 10):
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(images.png(noise))
    reader = page_of(tmp_path, folder)
    assert "3 of 6 sheets are shown, evenly chosen." in reader.text
    shown = reader.all("img")
    assert [shown[0]["data-step"], shown[-1]["data-step"], len(shown)] == ["10", "60", 3]
    assert shown[-1]["src"].startswith("data:image/jpeg;base64,")
    assert shown[-1]["width"] == "1600"
    assert "scaled down and stored as JPEG" in reader.text


@pytest.mark.parametrize(("height", "width", "shown"), [(70_000, 8, "2"), (4, 3200, "1600"), (900, 1600, "1600")])
def test_sheets_are_scaled_down_in_both_directions(tmp_path, height, width, shown):
    folder = write_training(tmp_path / "run", 10)
    white = images.np.full((height, width, 3), 255, dtype="uint8")
    (folder / "samples" / "step-00000010.png").write_bytes(images.png(white))
    (sheet,) = page_of(tmp_path, folder).all("img")
    assert int(sheet["width"]) == int(shown) * (2 if width < 1000 else 1)
    assert sheet["src"].startswith(f"data:image/{'png' if height == 900 else 'jpeg'};")


def test_a_page_takes_the_place_of_a_page_alone(tmp_path):
    folder = write_training(tmp_path / "run", 10)
    output = tmp_path / "page.html"
    for _ in range(2):
        report([str(folder)], str(output))
    output.write_text("mine")
    with pytest.raises(ConfigError, match="no report"):
        report([str(folder)], str(output))
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        report([str(folder)], str(tmp_path))
    with pytest.raises(StorageError):
        report([str(folder)], str(folder / "run.yaml" / "page.html"))
    with pytest.raises(DataError, match="holds some"):
        report([str(tmp_path)], str(tmp_path / "other.html"))


def strictly(text: str) -> Any:
    """JSON as browsers read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_what_is_infinite_ends_no_curve(tmp_path):
    lines = log_lines(20)
    for line in lines:
        line["noise_level_loss"] = {f"0_{'9' * 400}-1.0": 1.0, "1_0.5-1.0": 1.0}
    lines[-2]["samples_seen"] = math.inf
    write_log(tmp_path / "run", lines)
    reader = page_of(tmp_path, tmp_path / "run")
    data = [strictly(a[name]) for _, a in reader.elements for name in ("data-chart", "data-runs") if name in a]
    assert len(data) > 5
    assert data[0][0]["samples"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        toolbar([Axis("a", True, math.inf, [1], [0.0])])


def test_hours_never_go_back(tmp_path):
    lines = log_lines(40)
    for line in lines[20:]:
        line["time"] -= 3600 * 5  # as of another machine, on which it went on
    write_log(tmp_path / "run", lines)
    reader = page_of(tmp_path, tmp_path / "run")
    assert "38 s from the first line of the log to the last." in reader.text
    hours = next(strictly(a["data-runs"]) for a in reader.all("div") if "data-runs" in a)
    assert hours[0]["hours"] == sorted(hours[0]["hours"])
    assert hours[0]["hours"][-1] == pytest.approx(38 / 3600, abs=1e-4)


def test_runs_without_a_curve_have_no_button(tmp_path):
    write_log(tmp_path / "empty", [])
    write_log(tmp_path / "untimed", [{"step": 1, "loss": 1.0}])
    folders = [
        write_encoded(tmp_path / "latents"),
        write_training(tmp_path / "a"),
        tmp_path / "untimed",
        tmp_path / "empty",
    ]
    reader = page_of(tmp_path, *folders)
    assert [a["data-run"] for a in reader.all("button") if "data-run" in a] == ["1", "2"]
    assert "select" not in [name for name, _ in reader.elements]  # hours of one of them are not known


def test_curves_of_many_runs_can_be_told_apart(tmp_path):
    lines = [line | {"noise_level_loss": {"0_0.5-1.0": 1.0}} for line in log_lines(10)]
    for number in range(10):
        write_log(tmp_path / f"run-{number}", lines)
    reader = page_of(tmp_path, *(tmp_path / f"run-{number}" for number in range(10)))
    for title in ("Loss", "Gradient norm", "Parts of a step", "Loss over the noise level, training"):
        curves = chart(reader, title)["curves"]
        assert len({(curve["hue"] % 8, curve["dash"] % 7) for curve in curves}) == len(curves) >= 10
    assert {a["class"] for a in reader.all("span") if "swatch" in a.get("class", "")} >= {
        "swatch c0",
        "swatch c0 again",
    }


def test_levels_of_several_runs_stand_by_their_runs(tmp_path):
    reader = page_of(tmp_path, write_encoded(tmp_path / "l"), *(write_training(tmp_path / name) for name in "ab"))
    found = [json.loads(a["data-chart"]) for a in reader.all("figure") if "data-chart" in a]
    levels = [one for one in found if one["title"].startswith("Loss by noise level")]
    assert [{curve["run"] for curve in one["curves"]} for one in levels] == [{1}, {2}]


def test_charts_of_two_runs_by_level_stand_side_by_side(tmp_path):
    for name in "ab":
        write_log(tmp_path / name, [line | {"noise_level_loss": {"0_0.5-1.0": 1.0}} for line in log_lines(10)])
    reader = page_of(tmp_path, *(tmp_path / name for name in "ab"))
    titles = [json.loads(a["data-chart"])["title"] for a in reader.all("figure") if "data-chart" in a]
    levels = [title for title in titles if "noise level" in title]
    assert [title.startswith("Loss by") for title in levels] == [True] * 4 + [False] * 2


def test_bands_are_told_of_by_the_curves_that_have_one(tmp_path):
    write_log(tmp_path / "a", log_lines(3000, validated=1000))
    write_training(tmp_path / "b")
    reader = page_of(tmp_path, *(tmp_path / name for name in "ab"))
    assert len(chart(reader, "Loss")["curves"]) > 3
    assert "no more than three" not in reader.text


def test_charts_of_a_measure_by_level_have_one_scale(tmp_path):
    reader = page_of(tmp_path, write_training(tmp_path / "run"))
    scales = [chart(reader, f"Loss by noise level, held out, {weights}")["scale"] for weights in ("main", "raw")]
    assert scales == ["validation_level_loss"] * 2


@pytest.mark.s3
def test_a_run_on_s3_has_a_page_there(tmp_path, s3_url):
    store = open_store(s3_url)
    folder = write_training(tmp_path / "run")
    for file in folder.rglob("*"):
        if file.is_file():
            name = str(file.relative_to(folder))
            store.write("metrics/00000001.jsonl" if name == "metrics.jsonl" else f"run/{name}", file.read_bytes())
    store.write("run/metrics/00000001.jsonl", (folder / "metrics.jsonl").read_bytes())
    report([f"{s3_url}/run"], f"{s3_url}/page.html")
    reader = Reader(store.read("page.html").decode())
    assert len(chart(reader, "Loss")["curves"]) == 3
    assert len(reader.all("img")) == 6


def test_losses_of_all_sizes_are_json(tmp_path):
    lines = [{"step": s, "time": NOW, "loss": v} for s, v in enumerate([1e308, 1e308, -1e-320, 5, math.pi])]
    write_log(tmp_path / "run", lines)
    assert chart(page_of(tmp_path, tmp_path / "run"), "Loss")["curves"][0]["mean"][0] == 1e308
