from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.markdown import render_markdown
from lightning_ckmerge.report.text import ReportPlace
from lightning_ckmerge.report.view import build_view
from tests.support.outcomes import make_outcome

HOSTILE = "</title><script>alert('x')</script>\"'{{ 7*7 }}&amp;|`[a](http://b.example)\n# heading"
FILES = {"model.safetensors": {"bytes": 498_000_123, "sha256": "ef" * 32}}


class Page(HTMLParser):
    """The page's tags, attributes and visible text; a tag left open is an error."""

    VOID = frozenset({"meta"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def manifest(**kwargs: Any) -> dict[str, Any]:
    return {**build_manifest(make_outcome(**kwargs)), "files": FILES}


@pytest.mark.parametrize("status", ["accepted", "rejected", "unconfirmed"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("winner_is_anchor", [False, True])
def test_both_reports_give_the_same_figures(status: Any, mode: Any, winner_is_anchor: bool) -> None:
    data = manifest(status=status, mode=mode, winner_is_anchor=winner_is_anchor, warnings=("Beware of the bound.",))
    page = Page(render_html(data)).text
    # Non-breaking spaces are spaces, and escapes are not read aloud.
    markdown = " ".join(re.sub(r"\\(.)", r"\1", render_markdown(data)).split())
    interval = "" if status == "unconfirmed" else " [+0.0410, +0.0590]"
    for text in (
        status.capitalize(),
        data["verdict"]["sentence"],
        "Beware of the bound.",
        f"+0.0500{interval}",
        data["verdict"]["winner"],
        "ema-40",
        "2.0000",
        "897–960",
        "ababababab",
        "498.0 MB",
        "11.3 s",
        "2.1 %",
        "8 trials",
        "3 anchors",
        data["software"]["torch"],
        'load_merged("step=000001000", model)',
    ):
        assert text in page
        assert text in markdown


def test_the_verdict_comes_first_with_its_colour() -> None:
    html = render_html(manifest(status="rejected"))
    page = Page(html).text
    assert page.index("The verdict on val_loss is: rejected.") < page.index("Candidates")
    assert '<span class="badge rejected">Rejected</span>' in html


def test_a_gain_is_told_in_training_steps_where_the_verdict_does() -> None:
    fact = "Worth, at the current slope"
    assert f"| {fact} | ≈ 310 further steps |" in render_markdown(manifest())
    assert f"{fact} ≈ 310 further steps" in Page(render_html(manifest())).text
    older = manifest()
    del older["verdict"]["equivalent_steps"]
    assert fact not in render_html(manifest(status="rejected")) + render_html(older) + render_markdown(older)


def test_the_winner_leads_and_the_anchors_follow_from_best_to_worst() -> None:
    rows = re.findall(r'class="name">([\w-]+) <span', render_html(manifest(mode="max")))
    assert rows == ["trial-6", "uniform-4", "ema-40", "latest"]
    rows = re.findall(r'class="name">([\w-]+) <span', render_html(manifest(winner_is_anchor=True)))
    assert rows == ["uniform-4", "ema-40", "latest"]


@pytest.mark.parametrize(("mode", "gain"), [("min", "+0.0380"), ("max", "+0.0380")])
def test_a_gain_is_positive_when_better(mode: Any, gain: str) -> None:
    row = next(line for line in render_markdown(manifest(mode=mode)).splitlines() if line.startswith("| uniform-4"))
    assert row.split(" | ")[3] == gain


def test_what_was_chosen_by_one_metric_is_shown_on_all() -> None:
    data = manifest(others={"val_acc/dataloader_idx_1": 0.75, "a_loss": 3.0})
    assert [line for line in render_markdown(data).splitlines() if "val\\_" in line or "a\\_loss" in line][-3:] == [
        "| val\\_loss | monitored | 2.0500 | 2.0120 | 2.0000 | −0.0500 |",
        "| a\\_loss |  | 3.0500 | 3.0120 | 3.0000 | −0.0500 |",
        "| val\\_acc/dataloader\\_idx\\_1 |  | 0.80000 | 0.76200 | 0.75000 | −0.0500 |",
    ]
    assert "| metric |  | latest | uniform-4 | trial-6 | change |" in render_markdown(data)
    page = Page(render_html(data)).text
    assert "Metric latest uniform-4 trial-6 Change val_loss monitored 2.0500 2.0120 2.0000 −0.0500 a_loss" in page
    assert "All metrics" not in render_html(manifest()) + render_markdown(manifest())


def test_a_metric_that_one_candidate_lacks_has_no_change() -> None:
    data = manifest(others={"a": 3.0})
    del data["anchors"][0]["confirm"]["metrics"]["a"]
    assert "| a |  | – | 3.0120 | 3.0000 | – |" in render_markdown(data)


def test_the_front_of_several_metrics_is_shown_with_what_the_artifact_holds_of_it() -> None:
    data = manifest(others={"val_acc": 0.75})
    data["trials"][2]["search"]["metrics"] = {"val_loss": 1.9, "val_acc": 0.7}
    other = {"monitor": "val_acc", "mode": "max", "value": 0.75, "gain": 0.01, "interval": [0.002, 0.018]}
    data["verdict"].update(front=["trial-2", "uniform-4"], winner="uniform-4", others=[other])
    data["files"] = {**FILES, "front/trial-2/model.safetensors": FILES["model.safetensors"]}
    markdown = render_markdown(data)
    assert "| candidate |  | val\\_loss | val\\_acc | in this artifact |" in markdown
    assert "| trial-2 |  | 1.9000 | 0.70000 | front/trial-2 |" in markdown
    assert "| uniform-4 | winner | 2.0100 | 0.76000 |  |" in markdown
    assert "| Gain over latest, val\\_acc | +0.0100 \\[+0.0020," in markdown
    page = Page(render_html(data)).text
    assert "Pareto front Candidate val_loss val_acc In this artifact trial-2 1.9000 0.70000 front/trial-2" in page
    assert "Pareto front" not in render_html(manifest()) + render_markdown(manifest())


def test_the_page_asks_nothing_of_any_network() -> None:
    page = Page(render_html(manifest(monitor=HOSTILE)))
    assert not {"script", "link", "img", "iframe", "object", "base"} & {*page.tags}
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    html = render_html(manifest())
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_hostile_names_are_shown_as_they_are() -> None:
    """Metric and file names come from users' code, loader and sampler names from plugins."""
    data = manifest(monitor=HOSTILE, warnings=(HOSTILE,))
    data["space"] = HOSTILE
    data["anchors"][1]["name"] = data["verdict"]["best_anchor"] = HOSTILE
    data["files"] = {f"{HOSTILE}.bin": FILES["model.safetensors"]}
    data["cost"]["stopped_early"] = HOSTILE
    page = Page(render_html(data))
    assert "script" not in page.tags
    shown = " ".join(HOSTILE.split())
    # Title bar aside: sentence, warning, fact, space, candidate, caption, level, file, cost.
    assert page.text.count(shown) >= 9


def test_hostile_names_break_no_markdown() -> None:
    data = manifest(monitor=HOSTILE, warnings=(HOSTILE,))
    data["anchors"][1]["name"] = data["verdict"]["best_anchor"] = HOSTILE
    markdown = render_markdown(data)
    prose = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", prose)
    assert not re.search(r"(?<!\\)\]\(", prose)
    assert "\n# heading" not in prose
    for block in prose.split("\n\n"):
        if block.startswith("| "):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_record_offers_no_code_to_load_it() -> None:
    data = {**manifest(status="rejected"), "files": {}}
    for report in (render_html(data), render_markdown(data)):
        assert "holds no weights" in report
        assert "load_merged" not in report


def test_a_record_of_a_good_search_does_not_advise_to_use_it() -> None:
    data = {**manifest(), "files": {}}
    for report in (render_html(data), render_markdown(data)):
        assert "The weights of this merge are not kept" in report
        assert "Use the merge:" not in report


def test_names_in_backticks_are_set_as_code_and_escaped() -> None:
    warning = "The best `tau` lies on its bound: raise `<b>`."
    page = render_html(manifest(warnings=(warning,)))
    assert "The best <code>tau</code> lies on its bound: raise <code>&lt;b&gt;</code>." in page


def test_a_manifest_without_files_can_be_shown() -> None:
    """Extras render the report before the last file is known."""
    data = build_manifest(make_outcome())
    assert "holds no weights" in render_html(data)
    assert "Files" not in Page(render_html(data)).text


def test_missing_figures_are_dashes() -> None:
    outcome = make_outcome(status="unconfirmed")
    wild = replace(outcome.trials[0], search=Score(value=float("nan"), metrics={}))
    trials = (wild, *outcome.trials[1:])
    cost = replace(outcome.cost, share_of_training=None)
    verdict = replace(outcome.verdict, gain=float("nan"))
    data = build_manifest(replace(outcome, trials=trials, cost=cost, verdict=verdict))
    assert "| Gain over latest | – |" in render_markdown(data)
    assert "Share of training" not in render_markdown(data)
    assert not re.search(r"\b(nan|inf|None)\b", Page(render_html(data)).text)


PLACE = ReportPlace(path=Path("/data/gpt/merges/step=000001000"))


@pytest.mark.parametrize("status", ["accepted", "rejected", "unconfirmed"])
def test_a_report_says_of_which_run_it_is_and_what_to_do(status: Any) -> None:
    """Goes red without the values in the headline, the date, the run, the way back, and code that can be pasted."""
    data = {**manifest(status=status), "created": "2026-11-24T22:05:31+00:00"}
    html, markdown = render_html(data, PLACE), render_markdown(data, PLACE)
    for text in (Page(html).text, markdown.replace("\\_", "_")):
        assert "Merge at step 1 000: val_loss 2.0500 → 2.0000" in text
        assert "data/gpt · 2026-11-24 22:05 UTC" in text
        assert 'load_merged("/data/gpt/merges/step=000001000", model)' in text
        assert text.index("What to do next") < text.index("Candidates")
    assert 'href="../report.html"' in html


def test_names_are_explained_where_they_stand() -> None:
    data = manifest()
    data["anchors"][1]["name"] = data["verdict"]["best_anchor"] = "previous"
    data["anchors"][2]["search"]["complete"] = False
    assert {name for name, _ in build_view(data).meanings} == {"≈", "latest", "previous", "ema-40", "trial-6"}
    for report in (render_html(data), render_markdown(data)):
        assert "the optimum of the search before" in report


@pytest.mark.parametrize("anchor", ["latest", "winner"])
def test_a_gain_that_is_no_news_has_no_row(anchor: str) -> None:
    data = manifest()
    data["verdict"]["best_anchor"] = {"latest": "latest", "winner": data["verdict"]["winner"]}[anchor]
    labels = [label for label, _ in build_view(data).facts]
    assert [label for label in labels if label.startswith("Gain over")] == ["Gain over latest"]


def test_many_groups_are_told_by_what_they_have_in_common() -> None:
    """Goes red if a merge refined tensor by tensor makes a table of hundreds of columns."""
    few, many = manifest(), manifest()
    for content, num in ((few, 3), (many, 200)):
        rows = [[0.1 * g, *[0.0] * (len(content["snapshots"]) - 2), 1 - 0.1 * g] for g in range(num)]
        content["groups"] = {f"block.{g}": {"coefficients": row, "tensors": []} for g, row in enumerate(rows)}
    assert build_view(few).coefficient_names == ["block.0", "block.1", "block.2"]
    view = build_view(many)
    assert view.coefficient_names == ["mean of 200 groups", "lowest", "highest"]
    assert view.snapshots[0].coefficients[1:] == ["+0.0000", "+19.9000"]
    assert view.snapshots[-1].coefficients[1:] == ["\N{MINUS SIGN}18.9000", "+1.0000"]
