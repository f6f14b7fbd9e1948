from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, log_ticks, nice_ticks
from lightning_ckmerge.report.charts import MIN_BAR, coefficient_chart, history_chart
from tests.support.outcomes import make_outcome


def manifest(**kwargs: Any) -> dict[str, Any]:
    return build_manifest(make_outcome(**kwargs))


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Manifests with 1 to 12 snapshots of 1 to 10^6 steps, and coefficients of either sign."""
    data = manifest()
    lengths = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=12))
    last, data["snapshots"] = draw(st.integers(0, 10**6)), []
    for length in lengths:
        data["snapshots"].append({"kind": "mean", "first_step": last + 1, "last_step": last + length, "sha256": None})
        last += length
    data["coefficients"] = [draw(st.floats(-3, 3)) for _ in lengths]
    return data


@given(runs())
def test_bars_stand_side_by_side_inside_the_frame(data: dict[str, Any]) -> None:
    chart = coefficient_chart(data)
    assert len(chart.bars) == len(data["coefficients"])
    for bar, c in zip(chart.bars, data["coefficients"], strict=True):
        assert bar.width >= MIN_BAR - 1e-6
        assert bar.negative == (c < 0)
        # Positive bars stand on the axis, negative ones hang from it.
        assert math.isclose(bar.y if c < 0 else bar.y + bar.height, chart.zero, abs_tol=1e-6)
        assert TOP - 1e-6 <= bar.y <= bar.y + bar.height <= BOTTOM + 1e-6
    assert all(a.x + a.width < b.x for a, b in pairwise(chart.bars))
    assert chart.bars[0].x == LEFT


def test_a_bar_is_as_wide_as_its_steps() -> None:
    bars = coefficient_chart(manifest()).bars
    widths = [bar.width + 1 for bar in bars[:5]]
    assert widths == pytest.approx([widths[0] * n / 512 for n in (512, 256, 128, 64, 40)])
    assert bars[5].width == MIN_BAR
    assert bars[5].x + bars[5].width <= RIGHT


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_wild_trial_does_not_flatten_the_others(mode: Any) -> None:
    outcome = make_outcome(mode=mode)
    wild = replace(outcome.trials[0], search=Score(value=1e9 if mode == "min" else -1e9))
    lost = replace(outcome.trials[1], search=Score(value=math.nan))
    chart = history_chart(build_manifest(replace(outcome, trials=(wild, lost, *outcome.trials[2:]))))
    assert chart is not None
    rim = (TOP, "up") if mode == "min" else (BOTTOM, "down")
    assert [(m.y, m.shape) for m in chart.marks[:2]] == [rim, rim]
    levels = [level.y for level in chart.levels]
    assert max(levels) - min(levels) > 0.5 * (BOTTOM - TOP)
    assert all(TOP <= m.y <= BOTTOM and LEFT < m.x < RIGHT for m in chart.marks)


def test_marks_tell_what_became_of_a_trial() -> None:
    chart = history_chart(manifest())
    assert chart is not None
    assert [m.shape for m in chart.marks] == ["up", "up", "dot", "ring", "cross", "dot", "dot", "dot"]
    assert [m.winner for m in chart.marks] == [False] * 6 + [True, False]
    assert sorted(level.label for level in chart.levels if level.label_y is not None) == ["latest", "uniform-4"]


def test_no_mark_lies_under_a_label() -> None:
    """Labels end at the right rim, and a letter is less than 7 pixels wide."""
    chart = history_chart(manifest())
    assert chart is not None
    longest = max(len(level.label) for level in chart.levels if level.label_y is not None)
    assert all(m.x < RIGHT - 7 * longest for m in chart.marks)


def test_labels_of_close_anchors_do_not_overlap() -> None:
    data = manifest()
    data["anchors"][0]["search"]["value"] = data["anchors"][1]["search"]["value"] + 1e-4
    chart = history_chart(data)
    assert chart is not None
    first, second = (level.label_y for level in chart.levels if level.label_y is not None)
    assert abs(first - second) > 12


@pytest.mark.parametrize("value", [0.0, 2.0, -1e-12, 1e30])
def test_equal_values_have_a_scale_too(value: float) -> None:
    data = manifest()
    for candidate in (*data["anchors"], *data["trials"]):
        candidate["search"]["value"] = value
    chart = history_chart(data)
    assert chart is not None
    assert all(TOP < m.y < BOTTOM for m in chart.marks)
    assert all(TOP < level.y < BOTTOM for level in chart.levels)


def test_a_search_stopped_before_its_first_trial_is_drawn() -> None:
    chart = history_chart({**manifest(winner_is_anchor=True), "trials": []})
    assert chart is not None
    assert (chart.marks, len(chart.levels)) == ([], 3)


def test_nothing_finite_gives_no_chart() -> None:
    data = manifest()
    for candidate in (*data["anchors"], *data["trials"]):
        candidate["search"]["value"] = None
    assert history_chart(data) is None


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e3), st.integers(2, 8))
def test_ticks_are_few_round_and_inside(low: float, relative_span: float, num: int) -> None:
    span = relative_span * max(abs(low), 1e-3)
    high = low + span
    ticks = nice_ticks(low, high, num)
    assert 1 <= len(ticks) <= 2 * num + 1
    assert all(low - 1e-6 * span <= t <= high + 1e-6 * span for t in ticks)
    assert len({*ticks}) == len(ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e6), st.integers(2, 8))
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(low: float, ratio: float, num: int) -> None:
    ticks = log_ticks(low, low * ratio, num)
    assert 1 <= len(ticks) <= 4 * num
    assert all(low * (1 - 1e-6) <= t <= low * ratio * (1 + 1e-6) for t in ticks)
    assert ticks == sorted({*ticks})


@given(st.floats(1e-3, 1e3), st.floats(1.5, 1e4), st.floats(0, 1), st.booleans())
def test_an_axis_finds_back_what_it_placed(low: float, ratio: float, share: float, log: bool) -> None:
    axis = Axis(low=low, high=low * ratio, start=10, end=300, log=log)
    assert axis.share(axis.value(share)) == pytest.approx(share, abs=1e-6)
    assert axis.at(axis.value(share)) == pytest.approx(10 + 290 * share, abs=1e-3)
    assert axis.clipped(2 * axis.high) == pytest.approx(300)


@pytest.mark.parametrize("kind", ["mean", "point"])
def test_a_plain_mean_is_level(kind: str) -> None:
    """Over steps for means of unequal length, over snapshots for points."""
    data = manifest()
    lengths = [s["last_step"] - s["first_step"] + 1 for s in data["snapshots"][:-1]]
    weights = lengths if kind == "mean" else [1] * len(lengths)
    data["coefficients"] = [*(w / sum(weights) for w in weights), 0.0]
    for snapshot in data["snapshots"]:
        snapshot["kind"] = kind
        snapshot["first_step"] = snapshot["first_step"] if kind == "mean" else snapshot["last_step"]
    heights = [bar.height for bar in coefficient_chart(data).bars[:-1]]
    assert heights == pytest.approx([heights[0]] * len(heights))
    assert heights[0] > 0.8 * (BOTTOM - TOP)
