"""The pages as a browser sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.run import render_run_html
from lightning_ckmerge.report.text import ReportPlace
from tests.support.browser import find_browser, visit
from tests.support.outcomes import DIRPATH, make_history

BROWSER = find_browser()
PLACE = ReportPlace(path=DIRPATH / "step=000004000")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the pages were not opened")

PHONE = 360
PAPER = 718  # A4 between the browser's own margins
# What a reader sees first, without scrolling: inside the window, and of a size.
VERDICT = """(() => {
  const box = document.querySelector(".badge").getBoundingClientRect();
  return box.top >= 0 && box.bottom <= innerHeight && box.width > 40 && box.height > 10;
})()"""
# As long as they come.
STOPPED = (
    "after 10 anchors and 10 trials: further trials should add only 0.12 % of the gain, less than "
    "`search.min_gain_left`"
)
SENTENCE = 'document.querySelector(".sentence").innerText'
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
# The darkest channel of any background but the marks' and badges'.
LIGHTNESS = """Math.min(...["body", "section", "pre"].flatMap(name =>
  [...document.querySelectorAll(name)].map(e => getComputedStyle(e).backgroundColor).filter(c => !c.endsWith(", 0)"))
    .flatMap(c => c.match(/\\d+/g).slice(0, 3).map(Number))))"""
BEYOND_THEIR_BOX = """[...document.querySelectorAll("pre, .scroll, section, svg")].filter(e =>
  e.scrollWidth > e.clientWidth + 1).length"""
CUT_IN_TWO = """[...document.querySelectorAll("tr, figure, pre")].filter(e =>
  getComputedStyle(e).breakInside !== "avoid").length"""
HEADLESS = """[...document.querySelectorAll("th")].filter(e => !e.closest("thead")).length"""
BEYOND_THEIR_CARD = (
    """[...document.querySelectorAll("section")].filter(e => e.scrollWidth > e.clientWidth + 1).length"""
)
EMPTY_PICTURES = """[...document.querySelectorAll("svg")].filter(svg => svg.getBBox().width < 200).length"""


def search_page(monitor: str = "val_loss") -> str:
    manifest = make_history(monitor=monitor).manifests["step=000004000"]
    return render_html({**manifest, "cost": {**manifest["cost"], "stopped_early": STOPPED}}, PLACE)


def run_page(monitor: str = "val_loss") -> str:
    return render_run_html(make_history(monitor=monitor))


@pytest.mark.parametrize("width", [1100, PHONE])
@pytest.mark.parametrize(("make", "said"), [(search_page, "verdict"), (run_page, "The best merge, of step 4 000")])
def test_a_page_opens_in_silence_and_shows_its_verdict(
    tmp_path: Path, make: Callable[[], str], said: str, width: int
) -> None:
    """Goes red for a request, a console message, a verdict below the fold, text beside its card, an empty picture."""
    page = tmp_path / "report.html"
    page.write_text(make(), encoding="utf-8")
    assert BROWSER is not None
    questions = [VERDICT, SENTENCE, OVERFLOW, BEYOND_THEIR_CARD, EMPTY_PICTURES]
    seen = visit(BROWSER, page, tmp_path / "profile", questions, width=width)
    assert seen.requests == [page.as_uri()]
    assert seen.complaints == []
    shown, sentence, overflow, beyond, empty = seen.answers
    assert shown
    assert said in sentence
    assert overflow <= 0
    assert (beyond, empty) == (0, 0)


@pytest.mark.parametrize("make", [search_page, run_page])
def test_a_printed_page_is_light_and_cuts_nothing(tmp_path: Path, make: Callable[[], str]) -> None:
    """Goes red for a dark background, code or tables beyond their box, rows cut in two, headers that do not recur."""
    page = tmp_path / "report.html"
    page.write_text(make(), encoding="utf-8")
    assert BROWSER is not None
    questions = [LIGHTNESS, BEYOND_THEIR_BOX, CUT_IN_TWO, HEADLESS]
    seen = visit(BROWSER, page, tmp_path / "profile", questions, width=PAPER, media="print")
    darkest, beyond, cut, headless = seen.answers
    assert darkest > 220
    assert (beyond, cut, headless) == (0, 0, 0)


def test_a_hostile_name_runs_nothing(tmp_path: Path) -> None:
    hostile = "<script>window.ran = 1</script><img src='http://x.example/a.png' onerror='window.ran = 1'>"
    page = tmp_path / "report.html"
    page.write_text(search_page(hostile) + run_page(hostile), encoding="utf-8")
    assert BROWSER is not None
    seen = visit(BROWSER, page, tmp_path / "profile", ["window.ran", "document.images.length"])
    assert seen.requests == [page.as_uri()]
    assert seen.answers == [None, 0]


def test_the_test_sees_requests_and_complaints(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='other.png'><script>console.error('no')</script>", encoding="utf-8")
    assert BROWSER is not None
    seen = visit(BROWSER, page, tmp_path / "profile", [])
    assert seen.requests == [page.as_uri(), (tmp_path / "other.png").as_uri()]
    assert any("no" in complaint for complaint in seen.complaints)
