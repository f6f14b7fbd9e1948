"""Where the charts' marks lie, in pixels of a ``WIDTH x HEIGHT`` picture; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_ckmerge.report.view import Manifest, count, number, steps

# Small enough that the letters can be read when a phone shrinks the picture.
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 464, 14, 224
MIN_BAR = 4.0
BAR_GAP = 1.0
LABEL_HEIGHT = 14.0

Scale = Callable[[float], float]
Shape = Literal["dot", "ring", "cross", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One snapshot's coefficient; ``hint`` shows under the pointer."""

    x: float
    y: float
    width: float
    height: float
    negative: bool
    hint: str


@dataclass(frozen=True, kw_only=True)
class CoefficientChart:
    """Coefficients over training steps; ``zero`` is the height of the axis."""

    bars: list[Bar]
    zero: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One trial: a dot. A ring was dropped early, a cross breaks a constraint, an arrow (up, down) is off the scale."""

    x: float
    y: float
    shape: Shape
    winner: bool
    hint: str


@dataclass(frozen=True, kw_only=True)
class Level:
    """One anchor: a horizontal line; ``label_y`` is ``None`` for all but the latest weights and the best anchor."""

    y: float
    hint: str
    label: str
    label_y: float | None


@dataclass(frozen=True, kw_only=True)
class HistoryChart:
    """Value per trial on the search half, anchors as lines."""

    marks: list[Mark]
    levels: list[Level]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def coefficient_chart(manifest: Manifest) -> CoefficientChart:
    """Return the winner's coefficients as bars, each as wide as its snapshot's steps."""
    snapshots, c_K = manifest["snapshots"], manifest["coefficients"]
    first, last = min(s["first_step"] for s in snapshots) - 1, max(s["last_step"] for s in snapshots)
    low, high = min(0.0, *c_K), max(0.0, *c_K)
    # Room on the right for the latest weights, whose steps the newest mean already covers.
    right = RIGHT - 2 * (MIN_BAR + BAR_GAP)

    x = _scale(first, last, LEFT, right)
    y = _scale(low, high, BOTTOM, TOP)
    bars, end = [], float(LEFT)
    for snapshot, c in zip(snapshots, c_K, strict=True):
        start = max(end, x(snapshot["first_step"] - 1))
        end = max(x(snapshot["last_step"]), start + MIN_BAR + BAR_GAP)
        bars.append(
            Bar(
                x=start,
                y=min(y(c), y(0)),
                width=end - start - BAR_GAP,
                height=abs(y(c) - y(0)),
                negative=c < 0,
                hint=f"steps {steps(snapshot)}, {snapshot['kind']}: {number(c, '+.4f')}",
            )
        )
    return CoefficientChart(
        bars=bars,
        zero=y(0),
        x_ticks=[Tick(at=x(t), label=count(t)) for t in nice_ticks(first, last, 4)],
        y_ticks=[Tick(at=y(t), label=number(t, ".6g")) for t in nice_ticks(low, high, 5)],
    )


def history_chart(manifest: Manifest) -> HistoryChart | None:
    """Return the values of trials and anchors on the search half; ``None`` if none is finite.

    The scale holds all anchors and the best trial. Worse trials beyond it are drawn as arrows on its rim, so that one
    wild proposal does not flatten the rest.
    """
    anchors, trials = manifest["anchors"], manifest["trials"]
    better = min if manifest["mode"] == "min" else max
    anchor_values, trial_values = _values(anchors), _values(trials)
    held = [*anchor_values, better(trial_values)] if trial_values else anchor_values
    if not held:
        return None
    if min(held) == max(held):
        held += trial_values
    margin = 0.08 * (max(held) - min(held)) or 0.5 * abs(held[0]) or 1.0
    low, high = min(held) - margin, max(held) + margin
    y = _scale(low, high, BOTTOM, TOP)
    num_trials = max(len(trials), 1)

    def x(index: int) -> float:
        return LEFT + (RIGHT - LEFT) * (index - 0.5) / num_trials

    return HistoryChart(
        marks=[_mark(t, x(i), y, low, high, manifest) for i, t in enumerate(trials, start=1)],
        levels=_levels(manifest, y),
        x_ticks=[Tick(at=x(int(t)), label=count(t)) for t in nice_ticks(1, num_trials, 5) if t == int(t)],
        y_ticks=[Tick(at=y(t), label=number(t, ".6g")) for t in nice_ticks(low, high, 5)],
    )


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """Return about ``num`` round numbers in ``[low, high]``.

    >>> nice_ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / num))
    # Two more digits than the step has: 0.1 * 3 shall read 0.3.
    digits = 2 - math.floor(math.log10(power))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - num))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def _mark(trial: dict[str, Any], x: float, y: Scale, low: float, high: float, manifest: Manifest) -> Mark:
    shape: Shape = "dot"
    value = trial["search"]["value"]
    hint = f"{trial['name']}: {number(value)}"
    if not trial["search"]["complete"]:
        shape, hint = "ring", f"{hint}, dropped early"
    if not trial["feasible"]:
        shape, hint = "cross", f"{hint}, breaks a constraint"
    worst = high if manifest["mode"] == "min" else low
    shown = worst if value is None else min(max(value, low), high)
    if shown != value:
        shape = "up" if shown == high else "down"
    winner = trial["name"] == manifest["verdict"]["winner"]
    return Mark(x=x, y=y(shown), shape=shape, winner=winner, hint=hint)


def _levels(manifest: Manifest, y: Scale) -> list[Level]:
    labelled = {"latest", manifest["verdict"]["best_anchor"]}
    levels: list[Level] = []
    taken: list[float] = []
    for anchor in sorted(manifest["anchors"], key=lambda a: a["name"] not in labelled):
        name, value = anchor["name"], anchor["search"]["value"]
        if value is None:
            continue
        label_y = None
        if name in labelled:
            label_y = y(value) - 4
            if any(abs(label_y - other) < LABEL_HEIGHT for other in taken) or label_y < TOP + LABEL_HEIGHT:
                label_y = y(value) + LABEL_HEIGHT
            taken.append(label_y)
        levels.append(Level(y=y(value), hint=f"{name}: {number(value)}", label=name, label_y=label_y))
    return levels


def _values(candidates: Sequence[dict[str, Any]]) -> list[float]:
    return [c["search"]["value"] for c in candidates if c["search"]["value"] is not None]


def _scale(low: float, high: float, at_low: float, at_high: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: at_low + (at_high - at_low) * (value - low) / span
