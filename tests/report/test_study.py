from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.pilot.advice import advise
from lightning_ckmerge.pilot.findings import find
from lightning_ckmerge.pilot.ledger import Ledger
from lightning_ckmerge.pilot.plan import make_plan
from lightning_ckmerge.pilot.study import run_study
from lightning_ckmerge.report.study import render_study_html
from tests.support.browser import find_browser, visit
from tests.support.quadratic import CIRCLING, Quadratic

BROWSER = find_browser()
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
BEYOND = """[...document.querySelectorAll("section")].filter(e => e.scrollWidth > e.clientWidth + 1).length"""
EMPTY_PICTURES = """[...document.querySelectorAll("svg")].filter(svg => svg.getBBox().width < 200).length"""
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a study of a paraboloid, whose checkpoints' directory may have any name."""

    def make_study(num: int = 6, limit: int | None = None, monitor: str = "val_loss") -> dict[str, Any]:
        points = (CIRCLING * 5)[:num]
        steps = [50 * (k + 1) for k in range(num)]
        plan = make_plan(num, limit)
        found = find(run_study(plan, Quadratic(points), 1, Ledger(tmp_path / f"{num}.jsonl", "")), steps)
        return {
            "created": "2026-11-24T22:05:31+00:00",
            "monitor": monitor,
            "mode": "min",
            "checkpoints": [{"path": f"<b>/step={s}.ckpt", "step": s, "sha256": ["0" * 64]} for s in steps],
            "evaluation": {
                "num_evaluations": 70,
                "most_evaluations": plan.num_evaluations,
                "search_batches": [8],
                "confirm_batches": [8],
                "seconds": 3.0,
            },
            **found,
            "geometry": {
                "distances_KK": [[float(abs(i - j)) for j in range(num)] for i in range(num)],
                "cosines_UU": [[1.0 if i == j else -0.5 for j in range(num - 1)] for i in range(num - 1)],
                "norm": 10.0,
            },
            "advice": advise(found, steps, monitor, "min"),
            "notes": [],
            "software": {"python": "3.11", "lightning": None},
        }

    return make_study


def test_a_page_answers_the_three_questions(make: Make) -> None:
    page = render_study_html(make())
    for heading in ("Which checkpoints", "How many", "How", "Finalists", "Cosine of the updates"):
        assert f"<h2>{heading}</h2>" in page
    assert "search: {space: pairwise}" in page
    # A rectangle for each of 15 pairs on three maps, and of 10 pairs of updates.
    assert len(re.findall(r'<rect class="(?:plus|minus)"', page)) == 3 * 15 + 10
    assert page.count('<path class="mark diamond"') > 10
    assert "steps 250 and 300: " in page.lower()


def test_a_page_asks_nothing_of_a_network_and_escapes(make: Make) -> None:
    page = render_study_html(make(monitor="<i>loss"))
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org)|<script|<i>", page)
    assert "&lt;i&gt;loss" in page


@pytest.mark.parametrize(("num", "limit"), [(2, None), (3, None), (20, 80)])
def test_small_and_thinned_studies_have_pages(make: Make, num: int, limit: int | None) -> None:
    page = render_study_html(make(num, limit))
    assert ("denser towards the newest" in page) == (limit is not None)
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page was not opened")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_in_silence(make: Make, tmp_path: Path, width: int) -> None:
    path = tmp_path / "study.html"
    path.write_text(render_study_html(make(12)), encoding="utf-8")
    assert BROWSER is not None
    seen = visit(BROWSER, path, tmp_path / "profile", [OVERFLOW, BEYOND, EMPTY_PICTURES], width=width)
    assert seen.requests == [path.as_uri()]
    assert seen.complaints == []
    overflow, *others = seen.answers
    assert overflow <= 0
    assert others == [0, 0]
