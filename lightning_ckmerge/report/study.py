"""The page of a pilot study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ckmerge.report import study_charts as charts
from lightning_ckmerge.report.html import render_page
from lightning_ckmerge.report.text import MISSING, count, date, gain_text, number, seconds

BADGES = {
    "accepted": "Merging helps",
    "unconfirmed": "Unconfirmed",
    "rejected": "Merging does not help",
}


@dataclass(frozen=True, kw_only=True)
class FinalistRow:
    """One finalist's line."""

    name: str
    told: str
    confirm: str
    gain: str
    search: str
    search_gain: str
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """Everything that the page shows but its charts; texts, unescaped."""

    title: str
    status: str
    badge: str
    sentence: str
    facts: list[tuple[str, str]]
    advice: str
    code: str
    date: str
    finalists: list[FinalistRow]
    checkpoints: list[tuple[str, str, str, str]]
    software: list[tuple[str, str]]
    notes: list[str]
    run: str = ""
    up: None = None


def render_study_html(study: Mapping[str, Any]) -> str:
    """Return a study as a page: escaped, self-contained, for light, dark, paper and small screens.

    Args:
        study: The content of ``study.json``.
    """
    return render_page(
        "study.html.j2",
        view=_view(study),
        no_code="",
        up_text="",
        monitor=study["monitor"],
        words={name: _without_question(study["advice"][name]) for name in ("which", "how_many", "how")},
        over_better=charts.gain_map(study, "gain_over_better"),
        over_newest=charts.gain_map(study, "gain_over_newest"),
        distances=charts.distance_map(study),
        cosines=charts.cosine_map(study),
        means=[c for c in (charts.means_chart(study, "num"), charts.means_chart(study, "steps")) if c],
        lines=[c for c in (charts.line_chart(study, line) for line in study["lines"]) if c],
        is_thinned=len(study["mapped"]) < len(study["checkpoints"]),
        num_mapped=len(study["mapped"]),
        num_checkpoints=len(study["checkpoints"]),
    )


def _view(study: Mapping[str, Any]) -> StudyView:
    advice, evaluation, checkpoints = study["advice"], study["evaluation"], study["checkpoints"]
    chosen = next(f for f in study["finalists"] if f["name"] == advice["choice"])
    newest = study["finalists"][0]
    values = {c["place"]: c["value"] for c in study["checkpoints_scored"]}
    return StudyView(
        title=f"A study of {len(checkpoints)} checkpoints, steps {count(checkpoints[0]['step'])} to "
        f"{count(checkpoints[-1]['step'])}",
        status=advice["status"],
        badge=BADGES[advice["status"]],
        sentence=advice["what"],
        facts=[
            (f"Newest checkpoint, {study['monitor']} ({study['mode']})", number(newest["confirm"])),
            ("Best of what the callback can merge", number(chosen["confirm"])),
            ("Gain, 95 % interval", _gain(chosen)),
            (
                "Evaluations",
                f"{count(evaluation['num_evaluations'])}, the last session {seconds(evaluation['seconds'])}",
            ),
            ("Batches to choose and to confirm", f"{_sum(evaluation, 'search')} + {_sum(evaluation, 'confirm')}"),
        ],
        advice=advice["limits"],
        code=advice["yaml"],
        date=date(study["created"]),
        finalists=[
            FinalistRow(
                name=f["name"].capitalize(),
                told=f["told"],
                confirm=number(f["confirm"]),
                gain=MISSING if f is newest else _gain(f),
                search=number(f["search"]),
                search_gain=MISSING if f is newest else gain_text(f["search_gain"], None),
                is_chosen=f is chosen,
            )
            for f in study["finalists"]
        ],
        checkpoints=[
            (
                count(c["step"]),
                number(values.get(k)),
                c["path"].rpartition("/")[2],
                ", ".join(s[:12] for s in c["sha256"]),
            )
            for k, c in enumerate(checkpoints)
        ],
        software=[(name, version or MISSING) for name, version in study["software"].items()],
        notes=list(study["notes"]),
    )


def _without_question(text: str) -> str:
    """An answer whose question stands above it as a heading."""
    answer = text.partition(": ")[2]
    return answer[:1].upper() + answer[1:]


def _gain(finalist: Mapping[str, Any]) -> str:
    return gain_text(finalist["gain"], finalist["interval"]) if finalist["gain"] is not None else MISSING


def _sum(evaluation: Mapping[str, Any], half: str) -> str:
    return count(sum(evaluation[f"{half}_batches"]))
