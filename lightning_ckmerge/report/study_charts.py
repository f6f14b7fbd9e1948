"""Charts of a pilot study: maps over pairs of checkpoints, means by their length, and values along lines.

Letters: K checkpoints, oldest first; U updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ckmerge.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, Tick, horizontal, vertical
from lightning_ckmerge.report.charts import Mark, Shape, short
from lightning_ckmerge.report.landscape import path
from lightning_ckmerge.report.text import count, number

# Numbers fit into the cells of a map of so many rows.
MAX_WRITTEN = 10
MAX_TICKS = 10
FAINTEST = 0.06
# Numbers with more places do not fit into a cell.
MAX_PLACES = 4
# Least distance of two labels beside each other.
LABEL_HEIGHT = 13.0


@dataclass(frozen=True, kw_only=True)
class PairCell:
    """One pair; ``negative`` and ``strength``, from 0 to 1, are its colour, ``text`` stands in it."""

    x: float
    y: float
    width: float
    height: float
    negative: bool
    strength: float
    text: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class PairMap:
    """A value for each pair; ``extreme`` is the one of the strongest colour."""

    cells: list[PairCell]
    extreme: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line with its marks; ``look`` tells it from the others, ``label`` stands at ``label_x``, ``label_y``."""

    line: str
    marks: list[Mark]
    look: str
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CurveChart:
    """Lines over one axis; ``levels`` are horizontal lines, ``posts`` vertical ones."""

    title: str
    curves: list[Curve]
    level: float | None
    posts: list[float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def gain_map(study: Mapping[str, Any], name: str) -> PairMap | None:
    """Return the gain of each pair, ``gain_over_better`` or ``gain_over_newest``; ``None`` if none is finite."""
    steps_K = _steps(study)
    values = {(p["older"], p["newer"]): p[name] for p in study["pairs"] if p[name] is not None}
    lams = {(p["older"], p["newer"]): p["lam"] for p in study["pairs"]}
    hints = {
        pair: f"steps {count(steps_K[pair[0]])} and {count(steps_K[pair[1]])}: {number(value, '+.3g')} at lam "
        f"{number(lams[pair], '.3g')}"
        for pair, value in values.items()
    }
    return _map(study["mapped"], steps_K, values, hints, "+")


def distance_map(study: Mapping[str, Any]) -> PairMap | None:
    """Return the distance of each pair of the map, as a share of the newest checkpoint's norm."""
    steps_K = _steps(study)
    norm = study["geometry"]["norm"] or 1.0
    distances = study["geometry"]["distances_KK"]
    mapped = study["mapped"]
    values = {(i, j): distances[i][j] / norm for i in mapped for j in mapped if i < j}
    hints = {(i, j): f"steps {count(steps_K[i])} and {count(steps_K[j])}: {v:.3g}" for (i, j), v in values.items()}
    return _map(mapped, steps_K, values, hints, "")


def cosine_map(study: Mapping[str, Any]) -> PairMap | None:
    """Return the cosine of the angle between each two updates; an update is named by the step at which it ends."""
    steps_K = _steps(study)
    cosines = study["geometry"]["cosines_UU"]
    ends = list(range(1, len(steps_K)))
    values = {(i, j): cosines[i - 1][j - 1] for i in ends for j in ends if i < j}
    hints = {
        (i, j): f"updates to steps {count(steps_K[i])} and {count(steps_K[j])}: {v:.3g}" for (i, j), v in values.items()
    }
    return _map(ends, steps_K, values, hints, "+")


def means_chart(study: Mapping[str, Any], by: str) -> CurveChart | None:
    """Return the gain of the uniform means over their number (``num``) or their length (``steps``)."""
    means = [m for m in study["means"] if m["gain"] is not None]
    if not means:
        return None
    x = _wide(0, max(m[by] for m in means))
    y = _scale([0.0, *(m["gain"] for m in means)])
    curves: list[Curve] = []
    for stride in sorted({m["stride"] for m in means}):
        own = sorted((m for m in means if m["stride"] == stride), key=lambda m: m["num"])
        points = [(x.at(m[by]), y.at(m["gain"])) for m in own]
        hints = [f"{m['num']} checkpoints over {count(m['steps'])} steps: {number(m['gain'], '+.3g')}" for m in own]
        label_y = points[-1][1] + 4
        while any(abs(label_y - c.label_y) < LABEL_HEIGHT and abs(points[-1][0] - c.label_x) < 40 for c in curves):
            label_y += LABEL_HEIGHT
        curves.append(
            Curve(
                line=path(points),
                marks=[_dot(point, hint) for point, hint in zip(points, hints, strict=True)],
                look=f"c{stride}",
                label=f"1/{stride}" if stride > 1 else "all",
                label_x=points[-1][0] + 7,
                label_y=label_y,
            )
        )
    return CurveChart(
        title="by number" if by == "num" else "by length",
        curves=curves,
        level=y.at(0.0),
        posts=[],
        x_ticks=x.ticks(5, count),
        y_ticks=y.ticks(5, short),
    )


def line_chart(study: Mapping[str, Any], line: Mapping[str, Any]) -> CurveChart | None:
    """Return the values along a pair, on the straight line and on the great circle.

    Where the ends are far apart in value, what lies past them would flatten the rest: it ends at the scale's rim.
    """
    straight, circle = ([(lam, v) for lam, v in line[name] if v is not None] for name in ("linear", "slerp"))
    if len(straight) < 2:
        return None
    sign = 1 if study["mode"] == "min" else -1
    inside = [v for lam, v in (*straight, *circle) if 0 <= lam <= 1]
    best = min(sign * v for _, v in (*straight, *circle))
    held = [*inside, sign * best] if inside else [v for _, v in straight]
    # As far past the worst end again as the best lies below it.
    rim = sign * (max(sign * v for v in held) + 0.5 * (max(sign * v for v in held) - best))
    y = _scale([*held, rim])
    x = _wide(min(lam for lam, _ in straight), max(lam for lam, _ in straight))
    curves = [_along(straight, x, y, "c1", "straight"), _along(circle, x, y, "c2", "SLERP")]
    steps_K = _steps(study)
    return CurveChart(
        title=f"Steps {count(steps_K[line['older']])} and {count(steps_K[line['newer']])}",
        curves=[c for c in curves if c is not None],
        level=None,
        posts=[x.at(0.0), x.at(1.0)],
        x_ticks=x.ticks(5, short),
        y_ticks=y.ticks(5, short),
    )


def _along(points: Sequence[tuple[float, float]], x: Axis, y: Axis, look: str, label: str) -> Curve | None:
    if not points:
        return None
    shape: Shape = "dot" if look == "c1" else "diamond"
    marks = [
        _dot((x.at(lam), y.at(v)), f"{label}, lam {number(lam, '.3g')}: {number(v)}", shape)
        for lam, v in points
        if y.low <= v <= y.high
    ]
    return Curve(line=path([(x.at(lam), y.clipped(v)) for lam, v in points]), marks=marks, look=look, label=label)


def _map(
    places: Sequence[int],
    steps_K: Sequence[int],
    values: Mapping[tuple[int, int], float],
    hints: Mapping[tuple[int, int], str],
    sign: str,
) -> PairMap | None:
    """Older ones to the right, newer ones upwards."""
    if not values:
        return None
    olders, newers = places[:-1], places[1:]
    width, height = (RIGHT - LEFT) / len(olders), (BOTTOM - TOP) / len(newers)
    extreme = max(map(abs, values.values()))
    # Two digits of the largest, and as many places for all.
    places_shown = max(0, 1 - math.floor(math.log10(extreme))) if extreme else 0
    is_written = len(olders) <= MAX_WRITTEN and places_shown <= MAX_PLACES
    cells = [
        PairCell(
            x=LEFT + olders.index(i) * width,
            y=BOTTOM - (newers.index(j) + 1) * height,
            width=width,
            height=height,
            negative=value < 0,
            strength=FAINTEST + (0.8 - FAINTEST) * abs(value) / (extreme or 1.0),
            text=_brief(value, places_shown, sign) if is_written else "",
            hint=hints[i, j],
        )
        for (i, j), value in values.items()
    ]
    every = -(-len(olders) // MAX_TICKS)
    return PairMap(
        cells=cells,
        extreme=number(max(values.values(), key=abs), ".3g"),
        x_ticks=[
            Tick(at=LEFT + (n + 0.5) * width, label=count(steps_K[k])) for n, k in enumerate(olders) if n % every == 0
        ],
        y_ticks=[
            Tick(at=BOTTOM - (n + 0.5) * height, label=count(steps_K[k]))
            for n, k in enumerate(newers)
            if n % every == 0
        ],
    )


def _brief(value: float, places: int, sign: str) -> str:
    """A number without the zero before its point: cells are narrow."""
    if not round(value, places):
        return "0"
    text = number(value, f"{sign}.{places}f")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _dot(point: tuple[float, float], hint: str, shape: Shape = "dot") -> Mark:
    return Mark(x=point[0], y=point[1], shape=shape, winner=False, hint=hint)


def _wide(low: float, high: float) -> Axis:
    """An axis with room for labels on the right."""
    margin = 0.06 * (high - low) or 1.0
    return horizontal(low - margin / 2, high + 1.4 * margin)


def _scale(values: Sequence[float]) -> Axis:
    margin = 0.08 * (max(values) - min(values)) or 0.5 * abs(values[0]) or 1.0
    return vertical(min(values) - margin, max(values) + margin)


def _steps(study: Mapping[str, Any]) -> list[int]:
    return [c["step"] for c in study["checkpoints"]]
