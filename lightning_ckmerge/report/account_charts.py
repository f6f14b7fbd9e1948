"""Charts of an account: gains with their intervals, the value along a line, and a map of a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_ckmerge.report.axes import BOTTOM, RIGHT, TOP, Axis, Tick, horizontal, vertical
from lightning_ckmerge.report.charts import Mark, short
from lightning_ckmerge.report.landscape import NUM_LEVELS, Cell, path
from lightning_ckmerge.report.text import gain_text, number, steps

ROW = 24
FOREST_LEFT = 112.0
# A place that is far worse than both ends flattens what lies between them.
MAX_STRETCH = 6.0


@dataclass(frozen=True, kw_only=True)
class ForestMark:
    """A gain; ``ends`` are those of its interval."""

    x: float
    y: float
    ends: tuple[float, float] | None
    shape: str
    look: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class ForestChart:
    """Gains one below another, each with its name; ``zero`` is the place of none, ``height`` the picture's."""

    labels: list[Tick]
    marks: list[ForestMark]
    zero: float
    height: float
    bottom: float
    x_ticks: list[Tick]
    is_paired: bool


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """The value along the line: a curve, the straight line between the ends, and the places that were scored."""

    curve: str
    chord: str
    marks: list[Mark]
    labels: list[tuple[float, float, str]]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class PlaneChart:
    """The value on the plane; a cell is as dark as its value is good."""

    cells: list[Cell]
    hints: list[str]
    marks: list[Mark]
    labels: list[tuple[float, float, str]]
    best: str
    worst: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def forests(figures: Mapping[str, Any]) -> dict[str, ForestChart]:
    """Return the chart of each figure that has gains, by its key."""
    found = {}
    if "snapshots" in figures:
        rows = [r for r in figures["snapshots"]["rows"] if r["value"] is not None]
        names = ["latest" if r["is_latest"] else steps(r) for r in rows]
        found["snapshots"] = draw_forest(names, [[(r["gain"], r["interval"])] for r in rows])
    for key in ("groups", "layers"):
        if key in figures:
            rows = figures[key]["rows"]
            pairs = [[(r["alone"], r["alone_interval"]), (r["without"], r["without_interval"])] for r in rows]
            found[key] = draw_forest([r["name"] for r in rows], pairs)
    return found


def draw_forest(names: Sequence[str], rows: Sequence[Sequence[tuple[float, Sequence[float] | None]]]) -> ForestChart:
    """Return the chart of one gain, or of two, for each name: a disc above a diamond."""
    ends = [v for row in rows for gain, interval in row for v in (gain, *(interval or ()), 0.0)]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    x = Axis(low=min(ends) - margin, high=max(ends) + margin, start=FOREST_LEFT, end=RIGHT)
    labels, marks = [], []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        middle = TOP + ROW * (i + 0.5)
        labels.append(Tick(at=middle, label=name))
        for j, (gain, interval) in enumerate(row):
            certain = interval is not None and not interval[0] <= 0 <= interval[1]
            told = gain_text(gain, list(interval) if interval else None)
            marks.append(
                ForestMark(
                    x=x.at(gain),
                    y=middle + (4.5 * (2 * j - 1) if len(row) > 1 else 0.0),
                    ends=(x.at(interval[0]), x.at(interval[1])) if interval else None,
                    shape="diamond" if j else "dot",
                    look=("good" if gain > 0 else "bad") if certain else "open",
                    hint=f"{name}{', if put back' if j else ''}: {told}",
                )
            )
    bottom = TOP + ROW * len(names)
    return ForestChart(
        labels=labels,
        marks=marks,
        zero=x.at(0),
        height=bottom + 24,
        bottom=bottom,
        x_ticks=x.ticks(4, short),
        is_paired=any(len(row) > 1 for row in rows),
    )


def line_chart(figure: Mapping[str, Any], account: Mapping[str, Any]) -> LineChart:
    """Return the value along the line. Far worse places lie on the rim, as arrows."""
    values, places = figure["values"], figure["places"]
    known = [(t, v) for t, v in zip(places, values, strict=True) if v is not None]
    ends = [account["values"]["latest"], account["values"]["merge"]]
    y = _value_axis([v for _, v in known], ends, account["mode"])
    x = horizontal(places[0], places[-1])
    marks = []
    for t, v in known:
        inside = y.low <= v <= y.high
        shape = "dot" if inside else ("up" if v > y.high else "down")
        hint = f"{t:g}: {number(v)}"
        marks.append(Mark(x=x.at(t), y=y.clipped(v), shape=shape, winner=t == 1, hint=hint))  # type: ignore[arg-type]
    # Beside the curve, which falls from latest to merge if the merge is any better.
    below = y.at(ends[1]) < BOTTOM - 30
    labels = [
        (x.at(0) + 24, y.at(ends[0]) - 8, "latest"),
        (x.at(1), y.at(ends[1]) + (20 if below else -12), "merge"),
    ]
    return LineChart(
        curve=path([(x.at(t), y.at(v)) for t, v in known if y.low <= v <= y.high]),
        chord=path([(x.at(0), y.at(ends[0])), (x.at(1), y.at(ends[1]))]),
        marks=marks,
        labels=labels,
        x_ticks=x.ticks(6, short),
        y_ticks=y.ticks(5, short),
    )


def plane_chart(figure: Mapping[str, Any], account: Mapping[str, Any]) -> PlaneChart:
    """Return the map of the plane."""
    xs, ys = figure["x"], figure["y"]
    half_x, half_y = ((axis[1] - axis[0]) / 2 for axis in (xs, ys))
    x = horizontal(xs[0] - half_x, xs[-1] + half_x)
    y = vertical(ys[0] - half_y, ys[-1] + half_y)
    sign = 1 if account["mode"] == "min" else -1
    finite = [sign * v for row in figure["values"] for v in row if v is not None]
    # Quantiles: the optimum is what matters, and it fills a small part of the range.
    edges = np.quantile(finite, np.linspace(0, 1, NUM_LEVELS + 1)[1:-1])
    cells, hints = [], []
    for v_y, row in zip(ys, figure["values"], strict=True):
        for v_x, value in zip(xs, row, strict=True):
            level = 0 if value is None else NUM_LEVELS - 1 - int(np.searchsorted(edges, sign * value))
            left, top = x.at(v_x - half_x), y.at(v_y + half_y)
            width, height = x.at(v_x + half_x) - left, y.at(v_y - half_y) - top
            cells.append(Cell(x=left, y=top, width=width, height=height, level=level))
            hints.append(f"{number(value)} at {v_x:.3g}, {v_y:.3g}")
    marks, labels = [], []
    for name, corner in figure["corners"].items():
        place = (x.at(corner["x"]), y.at(corner["y"]))
        shape = "dot" if name == "merge" else "diamond"
        hint = f"{name}: {number(corner['value'])}"
        marks.append(Mark(x=place[0], y=place[1], shape=shape, winner=name == "merge", hint=hint))  # type: ignore[arg-type]
        labels.append((place[0], place[1] + (20 if place[1] < BOTTOM - 40 else -12), name))
    best, worst = min(finite), max(finite)
    return PlaneChart(
        cells=cells,
        hints=hints,
        marks=marks,
        labels=labels,
        best=number(sign * best),
        worst=number(sign * worst),
        x_ticks=x.ticks(5, short),
        y_ticks=y.ticks(5, short),
    )


def _value_axis(values: Sequence[float], ends: Sequence[float], mode: str) -> Axis:
    """Hold the better values whole, and of the worse ones a few times the difference of the ends."""
    sign = 1 if mode == "min" else -1
    best = min(sign * v for v in [*values, *ends])
    worst_end = max(sign * v for v in ends)
    reach = MAX_STRETCH * (worst_end - best) or 1.0
    worst = min(max(sign * v for v in values), worst_end + reach)
    margin = 0.08 * (worst - best) or 0.5 * abs(best) or 1.0
    low, high = sorted((sign * (best - margin), sign * (worst + margin)))
    return vertical(low, high)
