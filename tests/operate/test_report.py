"""The report: complete, escaped, self-contained, and equal in its two files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from page_reader import Reader
from PIL import Image

from pipeline.errors import StorageError
from pipeline.operate.report import (
    CaptionedPicture,
    Chart,
    Curve,
    GeneratedPicture,
    Reconstruction,
    ReconstructionScores,
    ReportFacts,
    RetrievalScores,
    UnseenPicture,
    write_report,
)
from pipeline.operate.report.charts import MOST_POINTS, figure
from pipeline.operate.report.demo_page import duration, page
from pipeline.operate.report.markup import Html, join, tag

HOSTILE = "</figcaption><script>alert(1)</script> & \"quoted\" 'too'"
NO_UTF8 = "caf\udce9"  # as Python has the name of a file


def picture(value: int) -> np.ndarray:
    return np.full((4, 6, 3), value, dtype=np.uint8)


def facts() -> ReportFacts:
    curve = Curve("training", list(range(0, 60)), [1 / (i + 1) for i in range(60)])
    return ReportFacts(
        title="A run",
        summary="What it is.",
        retrieval=RetrievalScores(top1=0.6171875, top5=0.7734375, candidates=1117, prompts=128),
        reconstruction=ReconstructionScores(psnr_db=23.45, psnr_nonwhite_db=19.8, pictures=120),
        wall_seconds={"pack": 3.25, "train": 590.0},
        peak_rss_bytes=3 * 2**30,
        images_per_second={"train": 246.1},
        samples=[CaptionedPicture("red heart", picture(10))],
        reconstructions=[Reconstruction("blue heart", picture(20), picture(21), 31.4)],
        loss_charts=[Chart("Diffusion", "velocity MSE", [curve])],
        throughput_charts=[Chart("Speed", "images/s", [curve], log_scale=False)],
        generated=[GeneratedPicture("green heart", picture(30), picture(31), 1)],
        unseen=[UnseenPicture("black heart", "coloured object", picture(40), picture(41), 12.25, 0.5)],
        settings={"train": "job: train\n"},
        versions={"torch": "2.14.1"},
        hardware={"CPU cores": "2"},
        attribution="By them (https://example.org/a), CC-BY 4.0.",
    )


def test_both_files_tell_the_same_numbers(tmp_path):
    write_report(tmp_path / "new", facts())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
    told = json.loads((tmp_path / "new" / "report.json").read_text())
    assert told["prompt_retrieval_top1"] == 0.6171875
    assert told["prompt_retrieval_top5"] == 0.7734375
    assert (told["prompt_retrieval_candidates"], told["prompt_retrieval_prompts"]) == (1117, 128)
    assert (told["reconstruction_psnr_db"], told["reconstruction_psnr_nonwhite_db"]) == (23.45, 19.8)
    assert told["unseen"] == [
        {"caption": "black heart", "kind": "coloured object", "colour_delta_e": 12.25, "shape_iou": 0.5}
    ]
    assert told["wall_seconds"] == {"pack": 3.25, "train": 590.0}
    assert told["peak_rss_bytes"] == 3 * 2**30
    assert told["settings"] == {"train": "job: train\n"}
    assert told["loss_charts"][0]["curves"][0]["values"][0] == 1.0
    text = Reader((tmp_path / "new" / "report.html").read_text()).text.replace("\u00a0", " ")
    for shown in ("0.62", "0.77", "1,117", "128", "23.4", "19.8", "9 min 53 s", "3.0"):
        assert shown in text, shown
    for shown in ("red heart", "blue heart", "31.4 dB", "green heart", "own picture nearest", "black heart", "12.2"):
        assert shown in text, shown
    for shown in ("246.1", "job: train", "2.14.1", "CPU cores", "By them"):
        assert shown in text, shown


def test_the_page_loads_nothing_from_elsewhere():
    reader = Reader(page(facts()))
    for name, attributes in reader.elements:
        assert name not in ("link", "iframe", "object", "base", "form")
        assert "src" not in attributes or attributes["src"].startswith("data:image/png;base64,")
        assert "style" not in attributes
        assert not [a for a in attributes if a.startswith("on")]
    policy = next(m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_policy_allows_the_style_and_the_script_of_the_page():
    text = page(facts())
    for name in ("style", "script"):
        body = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{name}-src &#x27;sha256-{digest}&#x27;" in text


def test_pictures_are_inside_pixel_for_pixel_at_twice_their_size():
    pictures = Reader(page(facts())).all("img")
    seen = {}
    for attributes in pictures:
        decoded = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        assert (decoded.size, attributes["width"], attributes["height"]) == ((6, 4), "12", "8")
        seen[decoded.convert("RGB").getpixel((0, 0))[0]] = attributes["alt"]
    assert set(seen) == {10, 20, 21, 30, 31, 40, 41}
    assert seen[30] == "generated for: green heart"
    assert (seen[20], seen[21]) == ("original", "reconstruction")


def test_every_text_is_escaped():
    plain = facts()
    curve = replace(plain.loss_charts[0].curves[0], name=HOSTILE)
    hostile = replace(
        plain,
        title=HOSTILE,
        summary=HOSTILE,
        attribution=HOSTILE,
        wall_seconds={HOSTILE: 1.0},
        images_per_second={HOSTILE: 1.0},
        samples=[CaptionedPicture(HOSTILE, picture(1))],
        reconstructions=[Reconstruction(HOSTILE, picture(1), picture(1))],
        loss_charts=[Chart(HOSTILE, HOSTILE, [curve], note=HOSTILE)],
        generated=[GeneratedPicture(HOSTILE, picture(1), picture(1))],
        unseen=[UnseenPicture(HOSTILE, HOSTILE, picture(1), picture(1), 1.0, 1.0)],
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        hardware={HOSTILE: HOSTILE},
    )
    text = page(hostile)
    assert "<script>alert" not in text
    reader = Reader(text)
    assert len(reader.all("script")) == 1
    assert [e for e, _ in reader.elements] == [e for e, _ in Reader(page(_unhostile(hostile))).elements]
    assert reader.text.count(HOSTILE) >= 16


def test_a_name_that_is_no_utf8_is_shown_as_it_is_escaped(tmp_path):
    plain = facts()
    shown = [Chart("c", "u", [replace(plain.loss_charts[0].curves[0], name=NO_UTF8)])]
    write_report(tmp_path, replace(plain, samples=[CaptionedPicture(NO_UTF8, picture(1))], loss_charts=shown))
    reader = Reader((tmp_path / "report.html").read_bytes().decode())
    assert "caf\\udce9" in reader.text
    told = json.loads((tmp_path / "report.json").read_bytes())
    assert json.loads(reader.all("figure")[-2]["data-chart"])["curves"][0]["name"] == NO_UTF8
    assert told["loss_charts"][0]["curves"][0]["name"] == NO_UTF8


def _unhostile(hostile: ReportFacts) -> ReportFacts:
    """The same facts with a harmless text of the same place everywhere: the page must have the same elements."""

    def mend(value):
        if isinstance(value, str):
            return value.replace(HOSTILE, "harmless")
        if isinstance(value, dict):
            return {mend(k): mend(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(mend, value))
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{name: mend(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    return mend(hostile)


def test_numbers_that_are_none_are_null_in_json_and_a_dash_on_the_page(tmp_path):
    broken = replace(
        facts(),
        retrieval=RetrievalScores(top1=math.nan, top5=math.inf, candidates=0, prompts=0),
        wall_seconds={"pack": math.nan, "train": 1.0},
        loss_charts=[Chart("Diffusion", "", [Curve("a", [0, 1, 2], [math.nan, np.float32(0.5), -math.inf])])],
        unseen=[UnseenPicture("x", "y", picture(1), picture(1), math.nan, np.float64(math.inf))],
        peak_rss_bytes=None,
    )
    write_report(tmp_path, broken)

    def refuse(constant):
        raise AssertionError(constant)

    told = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert told["prompt_retrieval_top1"] is None
    assert told["prompt_retrieval_top5"] is None
    assert told["unseen"][0]["colour_delta_e"] is None
    assert told["wall_seconds"] == {"pack": None, "train": 1.0}
    assert told["loss_charts"][0]["curves"][0]["values"] == [None, 0.5, None]
    assert told["peak_rss_bytes"] is None
    text = (tmp_path / "report.html").read_text()
    assert "\u2013" in Reader(text).text
    assert not re.search(r'[ "(]-?(nan|inf)\b', text)


def test_what_is_missing_is_left_out(tmp_path):
    write_report(tmp_path, ReportFacts(title="Nothing yet"))
    reader = Reader((tmp_path / "report.html").read_text())
    assert reader.all("section") == []
    assert reader.all("h1") == [{}]
    assert json.loads((tmp_path / "report.json").read_text())["prompt_retrieval_top1"] is None


def test_headings_links_and_labels_lead_somewhere():
    reader = Reader(page(facts()))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in reader.all("a"):
        assert not attributes["href"].startswith("#") or attributes["href"][1:] in ids
    for attributes in reader.all("label"):
        assert attributes["for"] in ids
    for attributes in reader.all("section"):
        assert attributes["aria-labelledby"] in ids
    assert all("alt" in attributes for attributes in reader.all("img"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in reader.all("svg"))
    assert all(a["aria-labelledby"] in ids for a in reader.all("figure") if "aria-labelledby" in a)
    assert {"href": "https://example.org/a"} in reader.all("a")


def test_the_facts_give_the_same_page_again():
    assert page(facts()) == page(facts())


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        write_report(tmp_path / "file" / "inside", facts())


def drawn(*curves: Curve, **about: object) -> dict[str, object]:
    """What the page's script is given of a chart."""
    made = figure(Chart("c", "u", curves, **about), 7)
    return json.loads(Reader(made).all("figure")[0]["data-chart"])


def test_a_short_curve_is_drawn_as_it_is():
    curve = drawn(Curve("a", [0, 10, 20], [5.0, -3.0, 900.0]))["curves"][0]
    assert (curve["x"], curve["mean"], curve["lines"]) == ([0, 10, 20], [5.0, -3.0, 900.0], 1.0)
    assert "low" not in curve


def test_a_long_curve_keeps_its_least_and_greatest_and_says_so():
    values = np.zeros(100_000)
    values[[17, 54_321]] = 7.0, -9.0
    made = figure(Chart("c", "u", [Curve("a", np.arange(100_000), values)]), 0)
    curve = json.loads(Reader(made).all("figure")[0]["data-chart"])["curves"][0]
    assert len(curve["x"]) == len(curve["low"]) == MOST_POINTS
    assert (max(curve["high"]), min(curve["low"])) == (7.0, -9.0)
    assert curve["mean"][0] == pytest.approx(0.07)
    assert "Each point stands for 100 lines of the log" in Reader(made).text
    assert len(made) < 60_000


def test_values_that_are_not_finite_are_gaps_with_marks():
    chart = drawn(Curve("a", [0, 1, 2], [1.0, math.nan, math.inf]))
    assert chart["curves"][0]["mean"] == [1.0, None, None]
    assert chart["curves"][0]["broken"] == [1, 2]
    made = figure(Chart("c", "u", [Curve("a", [0, 1, 2], [1.0, math.nan, math.inf])]), 0)
    assert "a: 2 of 3" in Reader(made).text
    assert figure(Chart("c", "u", [Curve("a", [], [])]), 0) is None


def test_a_logarithmic_axis_is_offered_for_positive_values_only():
    assert drawn(Curve("a", [0, 1], [0.1, 1.0]))["log"]
    assert not drawn(Curve("a", [0, 1], [0.0, 1.0]))["log"]
    assert not drawn(Curve("a", [0, 1], [0.1, 1.0]), log_scale=False)["log"]


def test_the_ends_of_curves_stand_in_a_table_too():
    text = Reader(figure(Chart("c", "u", [Curve("a", [0, 1, 2], [0.5, 0.125, 0.25])]), 0)).text
    assert re.search(r"first.*last.*least.*greatest.*a.*0\.5.*0\.25.*0\.125.*0\.5", text, re.DOTALL)


def test_a_curve_of_uneven_length_is_refused():
    with pytest.raises(ValueError, match="2 steps, 1 values"):
        Curve("a", [0, 1], [0.0])


def test_markup_escapes_text_and_keeps_markup():
    assert tag("p", "<b>", Html("<i></i>"), None, class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;<i></i></p>'
    assert join("a & b", None) == "a &amp; b"
    assert tag("line", x1=0) == '<line x1="0"/>'


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.25, "4.2 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (593.25, "9 min 53 s"), (3900, "1 h 5 min")],
)
def test_duration(seconds, said):
    assert duration(seconds).replace("\u00a0", " ") == said
