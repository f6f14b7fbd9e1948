"""Charts of a whole run: the gain of each search, and the run's own validation with the merges on top."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ckmerge.report.axes import Axis, Tick, horizontal, vertical
from lightning_ckmerge.report.charts import Shape, short
from lightning_ckmerge.report.landscape import path
from lightning_ckmerge.report.text import count, gain_text, number

Record = dict[str, Any]

LOOKS: dict[str, tuple[str, Shape]] = {
    "accepted": ("good", "dot"),
    "rejected": ("bad", "cross"),
    "unconfirmed": ("open", "diamond"),
}


@dataclass(frozen=True, kw_only=True)
class GainPoint:
    """One search; ``ends`` are those of its 95 % interval."""

    x: float
    y: float
    ends: tuple[float, float] | None
    look: str
    shape: Shape
    hint: str


@dataclass(frozen=True, kw_only=True)
class GainChart:
    """Gain over training; ``zero`` is the height of no gain."""

    points: list[GainPoint]
    zero: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Lift:
    """One search on the validation curve: from the latest weights to the merge, both on the confirmation half."""

    x: float
    latest: float
    merged: float
    look: str
    shape: Shape
    hint: str


@dataclass(frozen=True, kw_only=True)
class ValidationChart:
    """The run's validation as an SVG path, empty if unknown, and the searches on it."""

    line: str
    lifts: list[Lift]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def gain_chart(timeline: Sequence[Record]) -> GainChart | None:
    """Return the gain of each search over the weights of its step; ``None`` if none is finite."""
    shown = [r for r in timeline if r["gain"] is not None]
    if not shown:
        return None
    ends = [end for r in shown for end in (r["gain"], *(r["interval"] or ()), 0.0)]
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    x = _steps(timeline)
    y = vertical(min(ends) - margin, max(ends) + margin)
    return GainChart(points=[_gain_point(r, x, y) for r in shown], zero=y.at(0), **_ticks(x, y))


def validation_chart(timeline: Sequence[Record]) -> ValidationChart | None:
    """Return the run's validation with the merges on top; ``None`` if nothing was measured.

    The scale leaves out how the run began: the first values of a pretraining would flatten all that follows.
    """
    curve = validation_curve(timeline)
    measured = [(r, r["values"].get("latest"), r["values"].get(r["winner"])) for r in timeline]
    lifts = [(r, latest, merged) for r, latest, merged in measured if latest is not None and merged is not None]
    first = lifts[0][0]["step"] if lifts else statistics.median(s for s, _ in curve) if curve else 0
    held = [v for _, latest, merged in lifts for v in (latest, merged)] + [v for s, v in curve if s >= first]
    if not held:
        return None
    margin = 0.25 * (max(held) - min(held)) or 0.5 * abs(held[0]) or 1.0
    x = _steps(timeline)
    y = vertical(min(held) - margin, max(held) + margin)
    inside = [(x.at(s), y.at(v)) for s, v in curve if y.low <= v <= y.high]
    return ValidationChart(
        line=path(inside) if len(inside) > 1 else "",
        lifts=[_lift(r, latest, merged, x, y) for r, latest, merged in lifts],
        **_ticks(x, y),
    )


def validation_curve(timeline: Sequence[Record]) -> list[tuple[int, float]]:
    """Return step and value of each validation of the run; of a step that was trained again, the last one."""
    by_step = {step: value for record in timeline for step, value in record["validation"]}
    return sorted(by_step.items())


def _steps(timeline: Sequence[Record]) -> Axis:
    return horizontal(0, 1.04 * max(1, *(r["step"] for r in timeline)))


def _ticks(x: Axis, y: Axis) -> dict[str, list[Tick]]:
    return {"x_ticks": x.ticks(5, count), "y_ticks": y.ticks(5, short)}


def _gain_point(record: Record, x: Axis, y: Axis) -> GainPoint:
    look, shape = LOOKS[record["status"]]
    interval = record["interval"]
    return GainPoint(
        x=x.at(record["step"]),
        y=y.at(record["gain"]),
        ends=(y.at(interval[0]), y.at(interval[1])) if interval else None,
        look=look,
        shape=shape,
        hint=f"step {count(record['step'])}, {record['status']}: {gain_text(record['gain'], interval)}",
    )


def _lift(record: Record, latest: float, merged: float, x: Axis, y: Axis) -> Lift:
    look, shape = LOOKS[record["status"]]
    hint = f"step {count(record['step'])}, {record['status']}: {number(latest)} to {number(merged)}"
    return Lift(x=x.at(record["step"]), latest=y.at(latest), merged=y.at(merged), look=look, shape=shape, hint=hint)
