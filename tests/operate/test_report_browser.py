"""The page in a real browser: no complaints, curves and pictures drawn, everything that can be clicked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from run_folders import LEVELS, NOW, log_lines, write_encoded, write_log, write_training

from pipeline.operate.report.job import report

pytestmark = pytest.mark.browser
LOSS = "#losses .chart"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, and several: with values that are not finite, long logs, unlike lengths, another kind, an encode job."""
    folder = tmp_path_factory.mktemp("pages")
    first, second = write_training(folder / "a"), write_training(folder / "b", scale=2.0)
    lines = log_lines(4000)
    for line in lines[2000:2100]:
        line["loss"] = math.nan
    write_log(folder / "long", lines)
    write_log(folder / "vae", [{"step": s, "time": NOW, "loss": 5.0, "reconstruction_loss": 5.0} for s in (1, 2)])
    write_log(folder / "one", log_lines(1))
    write_log(folder / "empty", [])
    pages = {"one": [first], "several": [first, second, folder / "long"]}
    write_log(folder / "short", log_lines(1000, every=10, validated=50))
    write_log(folder / "longer", longer_lines())
    pages["uneven"] = [folder / "short", folder / "longer"]
    pages["longer"] = [folder / "longer"]
    pages["levels"] = [write_encoded(folder / "encoded"), first, second]
    pages["odd"] = [folder / "vae", folder / "one", folder / "empty", write_encoded(folder / "latents")]
    for name, runs in pages.items():
        report([str(run) for run in runs], str(folder / f"{name}.html"))
    return {name: folder / f"{name}.html" for name in pages}


def longer_lines() -> list[dict[str, Any]]:
    """A log with few validations, a spike, a count that is infinite, and factors of all sizes."""
    lines = log_lines(10_000, every=10, validated=250)
    for line in lines:
        if "loss" in line:
            line["loss"] = 0.5 + 1e-5 * (line["step"] % 50)
            line["gradient_norm"] = 1e18 if line["step"] == 3000 else 2.0
            line["loss_scale"] = 1.7e308 if line["step"] == 5000 else 1e-300
            line["samples_seen"] = math.inf
        else:
            line["validation_seconds"] = 500 + line["step"] / 100
            line["validation_level_loss"]["raw"] = dict.fromkeys(LEVELS, 3.0)
    return lines


@pytest.fixture(autouse=True)
def no_complaints(browser: Browser) -> Iterator[None]:
    browser.complaints.clear()
    yield
    browser.settle()
    assert browser.complaints == []


def drawn(browser: Browser, selector: str = f"{LOSS} .plot path.strong") -> list[str]:
    """What the curves look like, once they are drawn."""
    browser.settle()
    return list(browser.run(f"[...document.querySelectorAll({selector!r})].map((path) => path.getAttribute('d'))"))


def texts(browser: Browser, selector: str) -> list[str]:
    browser.settle()
    return list(browser.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)"))


def ticks(browser: Browser, chart: str = LOSS) -> list[str]:
    return texts(browser, f"{chart} .plot text")


def said(browser: Browser, chart: str = LOSS) -> str:
    """What a screen reader is told of a chart."""
    browser.settle()
    return str(browser.run(f"document.querySelector({chart!r} + ' .plot svg').getAttribute('aria-valuetext')"))


def called(title: str) -> str:
    """A selector of the chart with that title."""
    return f"""[data-chart*='"title":"{title}"']"""


def across(browser: Browser, start: float, end: float, chart: str = LOSS) -> None:
    """Drag from one share of a chart's width to another."""
    left, top, width, _ = browser.box(f"{chart} .plot .grid")
    browser.drag((left + start * width, top + 40), (left + end * width, top + 40))


def choose(browser: Browser, selector: str, value: str, event: str) -> None:
    """Set a control, as a person does."""
    change = f"c.value = {value!r}; c.dispatchEvent(new Event('{event}'));"
    browser.run(f"(() => {{ const c = document.querySelector('{selector}'); {change} }})()")


def over(browser: Browser, share: float, chart: str = LOSS) -> None:
    """Point at a share of a chart's width."""
    left, top, width, _ = browser.box(f"{chart} .plot .grid")
    browser.point((left + share * width, top + 40))
    browser.settle()


@pytest.mark.parametrize(
    ("name", "width", "dark"),
    [("one", 1280, False), ("several", 390, True), ("odd", 1280, True), ("uneven", 400, False), ("longer", 1280, True)],
)
def test_everything_is_drawn(browser, pages, name, width, dark):
    browser.open(pages[name], width=width, dark=dark)
    charts = browser.run("document.querySelectorAll('.chart').length")
    assert charts > 3
    empty = browser.run(
        "[...document.querySelectorAll('.plot svg')].filter((s) => !s.querySelector('path, circle')).length"
    )
    assert empty == 0
    assert browser.run("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert browser.run("[...document.images].every((i) => i.hidden || i.naturalWidth > 0)")
    assert browser.run(
        "[...document.querySelectorAll('.plot path')].every((p) => !p.getAttribute('d').includes('NaN'))"
    )
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(23, 25, 28)" if dark else "rgb(247, 246, 243)")


def test_curves_are_zoomed_together_and_shown_whole_again(browser, pages):
    browser.open(pages["one"])
    whole, labels, norm = drawn(browser), ticks(browser), drawn(browser, "#optimisation .chart path.strong")
    assert browser.run("document.querySelector('#reset').disabled")
    left, top, width, height = browser.box(f"{LOSS} .plot svg")
    browser.drag((left + 0.5 * width, top + height / 2), (left + 0.8 * width, top + height / 2))
    assert drawn(browser) != whole
    assert ticks(browser) != labels
    assert drawn(browser, "#optimisation .chart path.strong") != norm
    browser.click("#reset")
    assert (drawn(browser), ticks(browser)) == (whole, labels)


def test_keys_read_and_zoom(browser, pages):
    browser.open(pages["one"])
    whole = drawn(browser)
    browser.run(f"document.querySelector('{LOSS} .plot svg').focus()")
    browser.press("Home")
    assert said(browser).startswith("step 1: training ")
    browser.press("ArrowRight")
    assert said(browser).startswith("step 2: training ")
    browser.press("End")
    assert said(browser).startswith("step 60: training ")
    browser.press("+")
    assert drawn(browser) != whole
    browser.press("0")
    assert drawn(browser) == whole


def test_the_pointer_reads_values(browser, pages):
    browser.open(pages["one"])
    left, top, width, height = browser.box(f"{LOSS} .plot svg")
    browser.point((left + width / 2, top + height / 2))
    assert texts(browser, f"{LOSS} .where")[0].startswith("step ")
    assert browser.run(f"document.querySelector('{LOSS} .cursor').classList.contains('shown')")


def test_the_longer_of_two_runs_is_read_to_its_end(browser, pages):
    browser.open(pages["uneven"])
    assert "average 0.307 (at step 1,000), short held out, main 0.325 (at step 1,000)" in said(browser)  # its last ones
    over(browser, 0.6)
    number = int(said(browser).removeprefix("step ").partition(":")[0].replace(",", ""))
    assert 5900 < number < 6100
    assert "short training nothing, short held out, main nothing" in said(browser)
    assert "longer training 0.5, average 0.5, " in said(browser)
    assert "longer held out, main 0.27 (at step 5,000)" in said(browser)
    assert texts(browser, f"{LOSS} .legend .value")[0] == "\u2013"
    browser.run(f"document.querySelector('{LOSS} .plot svg').focus()")
    browser.press("End")
    assert said(browser).startswith("step 10,000: ")
    browser.press("Home")
    assert said(browser).startswith("step 10: ")
    assert "held out, main nothing" in said(browser)  # none was before


def test_nothing_is_read_beside_the_window(browser, pages):
    browser.open(pages["uneven"])
    across(browser, 0.54, 0.69)
    browser.run(f"document.querySelector('{LOSS} .plot svg').focus()")
    for key in ("Home", "ArrowLeft", "End", "ArrowRight"):
        browser.press(key)
        number = int(said(browser).removeprefix("step ").partition(":")[0].replace(",", ""))
        assert 5300 < number < 7000
        inside = browser.run(
            f"""[...document.querySelectorAll('{LOSS} .plot .cursor, {LOSS} .plot circle[r="3.5"]')].every((mark) => {{
              const box = document.querySelector('{LOSS} .plot .grid').getBBox(), place = mark.getBBox();
              return place.x > box.x - 5 && place.x + place.width < box.x + box.width + 5;
            }})"""
        )
        assert inside


def test_a_zoom_between_two_points_shows_the_line_between_them(browser, pages):
    browser.open(pages["uneven"])
    beside = called("Beside the steps")
    across(browser, 0.54, 0.69)
    labels = [float(text) for text in ticks(browser, beside) if text.isdecimal() or "." in text]
    assert len(labels) > 2
    assert all(550 <= label <= 575 for label in labels)
    assert said(browser, beside).endswith("short nothing, longer 575 (at step 7,500)")
    browser.click("#reset")
    across(browser, 0.15, 0.5)
    browser.click(".run-toggle", 1)
    assert "no value in this part" in texts(browser, f"{beside} .plot text")
    assert "0" not in texts(browser, f"{beside} .plot text")


def test_both_the_logged_value_and_the_average_are_told(browser, pages):
    browser.open(pages["one"])
    over(browser, 0.5)
    first = browser.run("JSON.parse(document.querySelector('#losses .chart').dataset.chart).curves[0]")
    place = first["x"].index(int(said(browser).removeprefix("step ").partition(":")[0]))
    logged, average = texts(browser, f"{LOSS} .legend .value")[0].split(", average ")
    assert float(logged) == pytest.approx(first["mean"][place], abs=6e-3)
    near = first["mean"][place - 2 : place + 3]
    assert float(average) == pytest.approx(sum(near) / len(near), abs=6e-3)
    assert logged != average


def test_one_large_value_does_not_end_the_moving_average(browser, pages):
    browser.open(pages["longer"])
    assert said(browser, called("Gradient norm")).endswith("gradient norm 2, average 2")
    assert browser.run("smoothed([9, 1, 2, 6], 0.5)") == pytest.approx([9, 4, 3, 4])  # a steep beginning is followed
    assert browser.run("smoothed([1.7e308, 1.7e308, null, 1.7e308], 1)") == [1.7e308, 1.7e308, None, 1.7e308]


def test_the_largest_numbers_have_axes(browser, pages):
    browser.open(pages["longer"])
    chart = called("Loss scale")
    linear = ticks(browser, chart)
    browser.click(f"{chart} .chart-head button")
    assert ticks(browser, chart) != linear
    assert browser.run("axisEnds(0.001, 0.001 + 2e-19, false)") == pytest.approx([0.0009, 0.0011])
    for low, high in ((5e-324, 1.7976931348623157e308), (1.7e308, 1.7e308), (-1.7e308, 1.7e308), (0, 0)):
        for log in ("true", "false")[low <= 0 :]:
            ends = browser.run(f"axisEnds({low}, {high}, {log})")
            assert ends[0] < ends[1]
            made = browser.run(f"({'logTicks' if log == 'true' else 'linearTicks'})(...{ends}, 7)")
            assert 1 < len(made["ticks"]) < 20
            labels = browser.run(f"tickTexts({made})")
            assert len(set(labels)) == len(labels)
            assert max(map(len, labels)) < 10


def test_charts_of_one_measure_have_one_scale(browser, pages):
    browser.open(pages["longer"])
    main = called("Loss by noise level, held out, main")
    raw = called("Loss by noise level, held out, raw")
    assert {"0", "3"} <= set(ticks(browser, main)) & set(ticks(browser, raw))
    for number in range(3):
        browser.click(f"{raw} .legend button", number)
    assert "3" not in ticks(browser, main)
    assert "all curves are hidden" in ticks(browser, raw)


@pytest.mark.parametrize("name", ["one", "several", "uneven", "longer"])
def test_curves_of_a_chart_differ_in_more_than_their_colour(browser, pages, name):
    browser.open(pages[name])
    found = browser.run(
        """[...document.querySelectorAll('.chart')].map((chart) => [...chart.querySelectorAll('.legend line')].map(
          (line) => [line.style.stroke, line.getAttribute('stroke-dasharray')]))"""
    )
    for curves in found:
        assert len({tuple(curve) for curve in curves}) == len(curves)
        assert name not in ("one", "longer") or len({dashes for _, dashes in curves}) == len(curves)


def test_the_toolbar_stays_in_sight(browser, pages):
    browser.open(pages["several"])
    browser.click("nav a[href='#throughput']")
    bottom = browser.run("document.querySelector('.toolbar').getBoundingClientRect().bottom")
    assert browser.run("document.querySelector('.toolbar').getBoundingClientRect().top") == 0
    assert 0 < bottom <= browser.run("document.querySelector('#throughput h2').getBoundingClientRect().top") < 300
    browser.click(".run-toggle", 1)
    assert browser.run("getComputedStyle(document.querySelectorAll('.run-toggle')[1]).opacity") == "1"


def test_the_toolbar_stays_where_there_are_curves(browser, pages):
    browser.open(pages["several"])
    for section, above in (("throughput", True), ("pictures", False)):
        browser.run(f"scrollTo(0, document.querySelector('#{section}').offsetTop + 150)")
        browser.settle()
        assert browser.run("!!document.elementFromPoint(640, 10).closest('.toolbar')") is above
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.querySelector('.toolbar')).display") == "none"
    browser.ask("Emulation.setEmulatedMedia", media="")


def test_curves_by_level_belong_to_their_run(browser, pages):
    browser.open(pages["levels"])
    chart = called("Loss by noise level, held out, main: b")
    choose(browser, "#along", "hours", "change")
    assert len(drawn(browser, f"{chart} .plot path")) == 3
    assert "NaN" not in "".join(drawn(browser, ".plot path"))
    browser.click(".run-toggle", 1)
    assert "all curves are hidden" in ticks(browser, chart)
    assert browser.run(f"document.querySelectorAll({chart!r} + ' .legend .unseen').length") == 3
    struck = f"getComputedStyle(document.querySelector({chart!r} + ' .legend button')).textDecorationLine"
    assert browser.run(struck) == "line-through"


def test_zooming_out_ends_with_what_is_seen(browser, pages):
    browser.open(pages["levels"])
    browser.click(".run-toggle", 1)
    across(browser, 0.5, 0.1)
    browser.run(f"document.querySelector('{LOSS} .plot svg').focus()")
    browser.press("-")
    assert browser.run(f"document.querySelector('{LOSS} .plot svg').getAttribute('aria-valuemin')") == "1"


def test_a_button_that_was_let_go_elsewhere_selects_nothing(browser, pages):
    browser.open(pages["one"])
    left, top, width, _ = browser.box(f"{LOSS} .plot .grid")
    browser.ask(
        "Input.dispatchMouseEvent", type="mousePressed", x=left + 9, y=top + 40, button="left", buttons=1, clickCount=1
    )
    browser.point((left + width / 2, top + 40))
    assert browser.run(f"document.querySelector('{LOSS} .selection').getAttribute('width')") == "0"


def test_what_is_below_a_chart_stays_while_it_is_read(browser, pages):
    browser.open(pages["uneven"])
    height = f"document.querySelector('{LOSS} .legend').offsetHeight"
    at_rest = browser.run(height)
    over(browser, 0.6)
    assert browser.run(height) >= at_rest


def test_a_loss_that_was_not_finite_is_told_as_such(browser, pages):
    browser.open(pages["several"])
    over(browser, 1860 / 4000)
    assert "long training not finite" in said(browser)


def test_a_small_chart_has_two_labels_at_least(browser, pages):
    browser.open(pages["one"], width=360)
    chart = called("Loss over the noise level, held out")
    assert browser.run(f"document.querySelectorAll({chart!r} + ' .plot .tick').length - 1") >= 2


def test_scale_smoothing_and_axis_are_set(browser, pages):
    browser.open(pages["one"])
    linear = drawn(browser)
    browser.click(f"{LOSS} .chart-head button")
    assert drawn(browser) != linear
    browser.click(f"{LOSS} .chart-head button")
    assert drawn(browser) == linear
    choose(browser, "#smoothing", "30", "input")
    assert drawn(browser) != linear
    choose(browser, "#smoothing", "0", "input")
    assert drawn(browser) == []
    assert len(drawn(browser, f"{LOSS} .plot path")) >= 3
    choose(browser, "#along", "samples", "change")
    assert "sample" in ticks(browser)
    assert "400" in ticks(browser)
    choose(browser, "#along", "hours", "change")
    assert "hour" in ticks(browser)


def test_pictures_follow_the_slider(browser, pages):
    browser.open(pages["one"])
    shown = "[...document.querySelectorAll('.album img')].filter((i) => !i.hidden).map((i) => i.dataset.step)"
    assert browser.run(shown) == ["60"]
    browser.run("document.querySelector('.album input').focus()")
    browser.press("Home")
    browser.press("ArrowRight")
    assert browser.run(shown) == ["20"]
    assert texts(browser, ".album output") == ["step 20"]
    browser.click(".album button")
    assert texts(browser, ".album button") == ["pause"]
    browser.click(".album button")
    assert texts(browser, ".album button") == ["play"]


def test_runs_are_compared_and_hidden(browser, pages):
    browser.open(pages["several"])
    count = len(drawn(browser))
    assert count == 3  # the training losses; validations are too few to be smoothed
    browser.click(".run-toggle", 1)
    assert len(drawn(browser)) == 2
    assert "b training" not in browser.run(f"document.querySelector('{LOSS} .plot svg').getAttribute('aria-valuetext')")
    browser.click(".run-toggle", 1)
    browser.click(f"{LOSS} .legend button", 0)
    assert len(drawn(browser)) == 2
    assert browser.run(f"document.querySelectorAll('{LOSS} .plot path.broken').length") > 0
    assert browser.run(f"document.querySelectorAll('{LOSS} .plot path.band').length") > 0


def test_axes_are_labelled_by_few_round_numbers(browser, pages):
    browser.open(pages["odd"])
    wrong = browser.run(
        """(() => {
          let seed = 1; const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647, wrong = [];
          for (let i = 0; i < 1000; i++) {
            const low = 10 ** (random() * 12 - 6), high = low * (1.01 + 10 ** (random() * 6 - 1));
            for (const make of [linearTicks, logTicks]) {
              const { ticks, step } = make(low, high, 7), air = (high - low) * 1e-6;
              const inside = ticks.every((t, n) => t >= low - air && t <= high + air && (n === 0 || t > ticks[n - 1]));
              const labels = new Set(tickTexts({ ticks, step }));
              const few = ticks.length >= 2 && ticks.length <= 10 && labels.size === ticks.length;
              if (!few || !inside) wrong.push([make.name, low, high, ticks, [...labels]]);
            }
          }
          return wrong.slice(0, 3);
        })()"""
    )
    assert wrong == []
    assert browser.run("tickTexts(linearTicks(0, 10000, 6))") == ["0", "2k", "4k", "6k", "8k", "10k"]
    assert browser.run("tickTexts(linearTicks(0, 6000, 6))")[1] == "1,000"
