"""The page in a real browser: no complaints, curves and pictures drawn, everything that can be clicked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from run_folders import NOW, log_lines, write_encoded, write_log, write_training

from pipeline.operate.report.job import report

pytestmark = pytest.mark.browser
LOSS = "#losses .chart"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, and several: with values that are not finite, a long log, another kind, an encode job."""
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
    pages["odd"] = [folder / "vae", folder / "one", folder / "empty", write_encoded(folder / "latents")]
    for name, runs in pages.items():
        report([str(run) for run in runs], str(folder / f"{name}.html"))
    return {name: folder / f"{name}.html" for name in pages}


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


@pytest.mark.parametrize(("name", "width", "dark"), [("one", 1280, False), ("several", 390, True), ("odd", 1280, True)])
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
    said = f"document.querySelector('{LOSS} .plot svg').getAttribute('aria-valuetext')"
    assert browser.run(said).startswith("step 1: training ")
    browser.press("ArrowRight")
    assert browser.run(said).startswith("step 2: training ")
    browser.press("End")
    assert browser.run(said).startswith("step 60: training ")
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


def test_scale_smoothing_and_axis_are_set(browser, pages):
    browser.open(pages["one"])
    linear = drawn(browser)
    browser.click(f"{LOSS} .chart-head button")
    assert drawn(browser) != linear
    browser.click(f"{LOSS} .chart-head button")
    assert drawn(browser) == linear
    set_to = "(() => {{ const c = document.querySelector('{}'); c.value = {!r}; c.dispatchEvent(new Event('{}')); }})()"
    browser.run(set_to.format("#smoothing", "30", "input"))
    assert drawn(browser) != linear
    browser.run(set_to.format("#smoothing", "0", "input"))
    assert drawn(browser) == []
    assert len(drawn(browser, f"{LOSS} .plot path")) >= 3
    browser.run(set_to.format("#along", "samples", "change"))
    assert "sample" in ticks(browser)
    assert "400" in ticks(browser)
    browser.run(set_to.format("#along", "hours", "change"))
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
              const labels = new Set(ticks.map((t) => tickText(t, step)));
              const few = ticks.length >= 2 && ticks.length <= 10 && labels.size === ticks.length;
              if (!few || !inside) wrong.push([make.name, low, high, ticks, [...labels]]);
            }
          }
          return wrong.slice(0, 3);
        })()"""
    )
    assert wrong == []
