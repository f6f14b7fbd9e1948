from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_ckmerge.artifact.history import History, read_history
from lightning_ckmerge.artifact.standing import Standing
from lightning_ckmerge.artifact.timeline import append_timeline, skip_record
from lightning_ckmerge.errors import ArtifactError
from lightning_ckmerge.report.axes import BOTTOM, TOP
from lightning_ckmerge.report.run import render_run_html, render_run_markdown, summarize
from lightning_ckmerge.report.run_charts import gain_chart, validation_chart, validation_curve
from lightning_ckmerge.report.view import NEXT
from tests.report.test_report import HOSTILE, Page
from tests.support.outcomes import DIRPATH, make_history


def reports(history: History) -> tuple[str, str]:
    return render_run_html(history), render_run_markdown(history)


def test_both_reports_say_whether_by_how_much_at_what_cost_and_how_to_load() -> None:
    page, markdown = reports(make_history())
    plain = " ".join(re.sub(r"\\(.)", r"\1", markdown).split())
    for text in (
        "Merging helped",
        "The best merge, of step 4 000, lowers val_loss from 2.145 to 2.055, 4.2 % less; 95 % interval 3.3 to 5.1 %",
        "4 searches: 2 accepted, 1 unconfirmed, 1 rejected, in 2.1 % of the training time.",
        "2.0549",
        "2.1449",
        "≈ 310 further steps",
        "−0.0300 [−0.0500, −0.0100]",
        "45.2 s",
        "val_loss 2.1449 → 2.0549 at step 4 000",
        "lightning_logs/version_3 · 2026-11-24 22:05 UTC",
        'load_merged("/data/lightning_logs/version_3/merges/step=000004000", model)',
    ):
        assert text in Page(page).text
        assert text in plain


@pytest.mark.parametrize(
    ("statuses", "badge", "said"),
    [
        (
            ("rejected", "rejected"),
            "Merging did not help",
            "No merge beats the latest weights; that of step 2 000 raises val",
        ),
        (
            ("rejected", "unconfirmed", "rejected"),
            "Unconfirmed",
            "No gain is certain yet: the merge of step 2 000 lowers",
        ),
    ],
)
def test_without_an_accepted_merge_nothing_is_claimed(statuses: Any, badge: str, said: str) -> None:
    for report in reports(make_history(statuses)):
        assert badge in report
        assert said in report
        assert NEXT[statuses[-2]] in re.sub("</?code>", "`", report)
        assert not NEXT[statuses[-2]].endswith(":")  # no code follows
        assert "load_merged" not in report


def test_a_run_whose_searches_were_all_skipped_says_so() -> None:
    skip = skip_record(700, "val_loss", "min", "0.1 s are left. Raise `search.max_fraction_of_training`.", 0.2)
    history = History(dirpath=DIRPATH, timeline=[skip], manifests={}, best=None)
    for report in reports(history):
        assert "No search took place" in report
        assert "0.1 s are left" in report
        assert NEXT["skipped"] in report
    assert "Use: the final weights" in summarize(history)


def stand(history: History, value: float) -> Standing:
    """Return how a run's first merge stands against final weights of this value."""
    leader = history.timeline[0]
    return Standing(
        run_id="a",
        monitor=leader["monitor"],
        mode=leader["mode"],
        step=3000,
        value=value,
        is_final=True,
        best="step=000001000",
        best_step=1000,
        best_value=leader["values"][leader["winner"]],
        interval=(0.0123, 0.0456),
    )


def test_where_newer_weights_are_better_nobody_is_told_to_load_the_merge() -> None:
    history = make_history()
    stale = replace(history, standing=stand(history, value=1.0))
    for report in reports(stale):
        assert "Use the final weights of step 3000, not the best merge" in re.sub(r"\\(.)", r"\1", report)
        assert "load_merged" not in report
    assert "load_merged" not in summarize(stale)
    assert "load_merged" in summarize(history)


@pytest.mark.parametrize("statuses", [("accepted", "rejected"), ("unconfirmed",), ("rejected",)])
@pytest.mark.parametrize("is_told", [False, True])
def test_a_summary_has_three_lines_and_tells_no_value_twice(statuses: tuple[Any, ...], is_told: bool) -> None:
    history = make_history(statuses)
    standing = stand(history, history.timeline[0]["values"]["latest"])
    summary = summarize(replace(history, standing=standing if is_told and history.best else None))
    assert len(summary.splitlines()) == 3
    values = re.findall(r"\d+\.\d+", summary)
    assert len(set(values)) == len(values)


def test_searches_link_to_their_reports_while_these_exist() -> None:
    history = make_history()
    del history.manifests["step=000002000"]
    page, _ = reports(history)
    assert re.findall(r'href="([^"]+)"', page) == [f"step=00000{n}000/report.html" for n in (1, 3, 4)]
    assert "step=000002000" in page


def test_a_hostile_name_becomes_neither_link_nor_markup() -> None:
    history = make_history(monitor=HOSTILE)
    for name in (HOSTILE, "javascript:alert(1)"):
        history.timeline.append({**history.timeline[0], "artifact": name})
        history.manifests[name] = history.manifests["step=000001000"]
    page, markdown = reports(history)
    assert len(re.findall("href", page)) == 4
    assert "script" not in Page(page).tags
    assert not re.search(r"(?<!\\)<", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))


def test_gains_lie_where_they_belong() -> None:
    chart = gain_chart(make_history().timeline)
    assert chart is not None
    assert [p.look for p in chart.points] == ["open", "good", "bad", "good"]
    assert [p.y < chart.zero for p in chart.points] == [True, True, False, True]
    assert [p.ends is None for p in chart.points] == [True, False, False, False]
    for point in chart.points[1:]:
        assert point.ends is not None
        assert TOP < point.ends[1] < point.y < point.ends[0] < BOTTOM


def test_the_curve_goes_through_all_validations_and_merges_lie_below_it() -> None:
    timeline = make_history().timeline
    assert [s for s, _ in validation_curve(timeline)] == list(range(250, 4001, 250))
    chart = validation_chart(timeline)
    assert chart is not None
    # The first validations, at 6.6 and 5.5, would flatten the rest.
    assert chart.line.count("L") == 12
    assert all(min(lift.latest, lift.merged) > TOP and max(lift.latest, lift.merged) < BOTTOM for lift in chart.lifts)


def test_steps_that_were_trained_again_count_once() -> None:
    timeline = make_history().timeline
    again = {**timeline[-1], "validation": [[4000, 9.0]]}
    assert validation_curve([*timeline, again])[-1] == (4000, 9.0)
    assert len(validation_curve([*timeline, again])) == 16


def test_a_run_without_validations_of_its_own_or_finite_values_is_shown_too() -> None:
    history = make_history(("rejected",))
    history.timeline[0].update(validation=[], gain=None, interval=None, values={"latest": None})
    assert gain_chart(history.timeline) is None
    assert validation_chart(history.timeline) is None
    page, markdown = reports(history)
    assert not re.search(r"\b(nan|inf|None)\b", Page(page).text + markdown)


def test_a_directory_without_searches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"timeline\.jsonl"):
        read_history(tmp_path)


def test_a_record_of_another_version_is_refused_by_its_line(tmp_path: Path) -> None:
    append_timeline(tmp_path, make_history().timeline[0])
    append_timeline(tmp_path, {"status": "accepted", "step": 3})
    with pytest.raises(ArtifactError, match=r"line 2 .* without artifact, cost"):
        read_history(tmp_path)
