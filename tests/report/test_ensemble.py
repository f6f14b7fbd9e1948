"""The page of an ensemble."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.report.ensemble import BADGES, render_ensemble_html
from tests.report.test_report import HOSTILE
from tests.report.test_study import BEYOND, EMPTY_PICTURES, OVERFLOW
from tests.support.browser import find_browser, visit

BROWSER = find_browser()


def gain(value: float, *interval: float) -> dict[str, Any]:
    return {"loss": {"gain": value, "interval": list(interval) or None}}


def contender(name: str, members: list[str], loss: float | None, error: float | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "members": members,
        "forward_passes": len(members),
        "weight_bytes": 4000 * len(members),
        "seconds": 0.5 * len(members),
        "loss": loss,
        **({} if error is None else {"accuracy": 0.75, "brier": 0.5, "calibration_error": error}),
        "gain_over_latest": gain(0.1, 0.05, 0.15) if loss is not None else gain(0.0),
        "gain_over_merge": gain(0.02, -0.01, 0.05) if name != "merge" else gain(0.0),
    }


def manifest(status: str = "unconfirmed", name: str = "trial-3", error: float | None = 0.04) -> dict[str, Any]:
    members = [
        {"name": name, "weight": 0.625, "loss": 1.25, "disagreement_with_merge": 0.0, "coefficients": [0.25, 0.75]},
        {"name": "step=000000600", "weight": 0.375, "loss": 1.5, "disagreement_with_merge": 0.125, "step": 600},
    ]
    members[1]["artifact"] = members[1]["name"]
    chosen = [{"name": name, "loss_so_far": 1.25}, {"name": members[1]["name"], "loss_so_far": 1.2}]
    steps = {"chosen": chosen, "loss": 1.1875, "weight_trials": 16}
    return {
        "created": "2026-11-24T22:05:31+00:00",
        "averaging": "outputs" if error is None else "probabilities",
        "predict": name,
        "step": 1200,
        "monitor": name,
        "members": members,
        "selection": {
            "rule": "greedy",
            "source": "doi:10.1145/1015330.1015432",
            "ensemble": steps,
            "snapshots": {"chosen": chosen[:1], "loss": 1.25, "weight_trials": 0},
            "pool": [{k: m[k] for k in ("name", "loss", "disagreement_with_merge")} for m in members],
        },
        "comparison": [
            contender("latest", ["latest"], 1.75, error),
            contender("merge", [name], 1.3, None if error is None else 0.05),
            contender("snapshots", ["latest", name], 1.2, error),
            contender("ensemble", [name, "step=000000600"], 1.225, error),
        ],
        "verdict": {
            "status": status,
            "gain": 0.075,
            "interval": [-0.01, 0.15],
            "num_differences": 25,
            "sentence": f"An ensemble, by {name}.",
            "notes": [f"Check {name}."],
        },
        "snapshots": [{"last_step": 600}, {"last_step": 1200}],
        "files": {},
        "software": {"python": "3.11", "lightning": None},
    }


def shown(page: str) -> str:
    """Return the page's text, after its style."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page.partition("</style>")[2])))


def test_a_page_tells_verdict_figures_members_and_steps() -> None:
    text = shown(render_ensemble_html(manifest(), "runs/ensemble"))
    assert text.index("An ensemble, by trial-3.") < text.index("On the confirmation half") < text.index("Members")
    for told in (
        "Check trial-3.",
        "+0.0200 [−0.0100, +0.0500]",
        "The calibration error falls from 0.0500 to 0.0400",
        "An ensemble of 2 checkpoints has a loss lower by 0.025",
        "0.25 of 600, 0.75 of 1 200",
        "published at step 600",
        "12.5 %",
        "4.00 %",
        "With the best weights of 16 trials",
        "8.0 kB",
        'load_ensemble("runs/ensemble", module)',
    ):
        assert told in text


@pytest.mark.parametrize("status", BADGES)
def test_each_verdict_says_whether_it_is_worth_its_passes(status: str) -> None:
    text = shown(render_ensemble_html(manifest(status), "ensemble"))
    assert BADGES[status] in text
    opening = {"accepted": "Worth its 2", "unconfirmed": "Not shown to be worth its 2", "rejected": "Not worth its 2"}
    assert opening[status] in text


def test_one_member_and_missing_figures_have_a_page() -> None:
    found = manifest("rejected", error=None)
    found["members"] = found["members"][:1]
    found["comparison"] = [contender("latest", ["latest"], None), *found["comparison"][1:]]
    text = shown(render_ensemble_html(found, "ensemble"))
    assert "Use the one model" in text
    assert "Calibration error" not in text
    bare = {k: found[k] for k in ("averaging", "members", "verdict", "files", "software")}
    least = [{"name": "latest", "forward_passes": 1, "loss": None}]
    page = render_ensemble_html({**bare, "comparison": least}, "ensemble")
    assert "None" not in shown(page)


def test_names_are_text_and_nothing_is_asked_of_a_network() -> None:
    page = render_ensemble_html(manifest(name=HOSTILE), f'"{HOSTILE}')
    assert HOSTILE not in page
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org|b\.example)|<script", page)
    assert "alert" in shown(page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the page was not opened")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_in_silence(tmp_path: Path, width: int) -> None:
    path = tmp_path / "ensemble.html"
    path.write_text(render_ensemble_html(manifest(name="a-rather-long-name-of-a-merge"), "ensemble"), encoding="utf-8")
    assert BROWSER is not None
    seen = visit(BROWSER, path, tmp_path / "profile", [OVERFLOW, BEYOND, EMPTY_PICTURES], width=width)
    assert seen.requests == [path.as_uri()]
    assert seen.complaints == []
    overflow, *others = seen.answers
    assert overflow <= 0
    assert others == [0, 0]
