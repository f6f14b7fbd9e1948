"""Where the charts' marks lie, in pixels of a ``WIDTH x HEIGHT`` picture; the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report.axes import LEFT, RIGHT, TOP, Axis, Tick, horizontal, nice_ticks, vertical
from lightning_ckmerge.report.text import count, number, steps

MIN_BAR = 4.0
BAR_GAP = 1.0
LABEL_HEIGHT = 14.0
LETTER_WIDTH = 7.0  # a little more than the font has
MOST_ROOM = 0.4  # share of the chart for names

Shape = Literal["dot", "ring", "cross", "diamond", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One snapshot's weight; ``hint`` shows its coefficient under the pointer."""

    x: float
    y: float
    width: float
    height: float
    negative: bool
    hint: str


@dataclass(frozen=True, kw_only=True)
class CoefficientChart:
    """Weights over training steps; ``zero`` is the height of the axis, ``unit`` is the quantity drawn upwards."""

    bars: list[Bar]
    zero: float
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One candidate. A dot is a trial, a diamond an anchor; a ring was dropped early, a cross breaks a constraint, an
    arrow (up, down) is off the scale.
    """

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


def weights_per_step(manifest: Manifest) -> tuple[list[float], str]:
    """Return how much each snapshot of the winner weighs, and the name of that.

    A mean's coefficient is spread over its steps, so that a plain mean over steps is level. The latest weights are no
    mean: they count as the shortest one does. Where there are points alone, their coefficients are compared.
    """
    lengths = [s["last_step"] - s["first_step"] + 1 for s in manifest["snapshots"]]
    is_mean = [s["kind"] == "mean" for s in manifest["snapshots"]]
    shortest = min((n for n, mean in zip(lengths, is_mean, strict=True) if mean), default=1)
    spans = [n if mean else shortest for n, mean in zip(lengths, is_mean, strict=True)]
    weights = [c / span for c, span in zip(manifest["coefficients"], spans, strict=True)]
    return weights, "weight per step" if any(is_mean) else "coefficient"


def coefficient_chart(manifest: Manifest) -> CoefficientChart:
    """Return the winner's weights as bars, each as wide as its snapshot's steps: its area is its coefficient."""
    snapshots, c_K = manifest["snapshots"], manifest["coefficients"]
    weights, unit = weights_per_step(manifest)
    first, last = min(s["first_step"] for s in snapshots) - 1, max(s["last_step"] for s in snapshots)
    low, high = min(0.0, *weights), max(0.0, *weights)
    # Room on the right for the latest weights, whose steps the newest mean already covers.
    right = RIGHT - 2 * (MIN_BAR + BAR_GAP)

    x = Axis(low=first, high=last, start=LEFT, end=right)
    y = vertical(low, high)
    bars, end = [], float(LEFT)
    for snapshot, c, weight in zip(snapshots, c_K, weights, strict=True):
        start = max(end, x.at(snapshot["first_step"] - 1))
        end = max(x.at(snapshot["last_step"]), start + MIN_BAR + BAR_GAP)
        bars.append(
            Bar(
                x=start,
                y=min(y.at(weight), y.at(0)),
                width=end - start - BAR_GAP,
                height=abs(y.at(weight) - y.at(0)),
                negative=c < 0,
                hint=f"steps {steps(snapshot)}, {snapshot['kind']}: coefficient {number(c, '+.4f')}",
            )
        )
    return CoefficientChart(
        bars=bars,
        zero=y.at(0),
        unit=unit,
        x_ticks=x.ticks(4, count),
        y_ticks=y.ticks(5, short),
    )


def history_chart(manifest: Manifest) -> HistoryChart | None:
    """Return the values of trials and anchors on the search half; ``None`` if none is finite.

    The scale holds all anchors and the best trial. Worse trials beyond it are drawn as arrows on its rim, so that one
    wild proposal does not flatten the rest.
    """
    y = value_axis(manifest)
    if y is None:
        return None
    trials = manifest["trials"]
    num_trials = max(len(trials), 1)
    levels = _levels(manifest, y)
    # The lines' names stand at their right ends, past the last trial's mark.
    room = LETTER_WIDTH * max((len(level.label) for level in levels if level.label_y is not None), default=0)
    x = replace(horizontal(0.5, num_trials + 0.5), end=RIGHT - min(room, MOST_ROOM * (RIGHT - LEFT)))
    return HistoryChart(
        marks=[mark(t, x.at(i), y, manifest) for i, t in enumerate(trials, start=1)],
        levels=levels,
        x_ticks=[Tick(at=x.at(t), label=count(t)) for t in nice_ticks(1, num_trials, 5) if t == int(t)],
        y_ticks=y.ticks(5, short),
    )


def value_axis(manifest: Manifest) -> Axis | None:
    """Return the vertical axis on which candidates are compared on the search half; ``None`` if no value is finite."""
    anchor_values, trial_values = _values(manifest["anchors"]), _values(manifest["trials"])
    better = min if manifest["mode"] == "min" else max
    held = [*anchor_values, better(trial_values)] if trial_values else anchor_values
    if not held:
        return None
    if min(held) == max(held):
        held += trial_values
    margin = 0.08 * (max(held) - min(held)) or 0.5 * abs(held[0]) or 1.0
    return vertical(min(held) - margin, max(held) + margin)


def mark(candidate: dict[str, Any], x: float, y: Axis, manifest: Manifest, shape: Shape = "dot") -> Mark:
    """Return the mark of a candidate at pixel ``x``; worse than the axis holds, it becomes an arrow on the rim."""
    value = candidate["search"]["value"]
    shape, hint = look(candidate, shape)
    shown = worst(y, manifest["mode"]) if value is None else min(max(value, y.low), y.high)
    if shown != value:
        shape = "up" if shown == y.high else "down"
    return Mark(x=x, y=y.at(shown), shape=shape, winner=is_winner(candidate, manifest), hint=hint)


def look(candidate: dict[str, Any], shape: Shape) -> tuple[Shape, str]:
    """Return a candidate's shape, which is ``shape`` if nothing befell it, and the hint that tells its value."""
    hint = f"{candidate['name']}: {number(candidate['search']['value'])}"
    if not candidate["feasible"]:
        return "cross", f"{hint}, breaks a constraint"
    if not candidate["search"]["complete"]:
        return "ring", f"{hint}, dropped early"
    return shape, hint


def is_winner(candidate: dict[str, Any], manifest: Manifest) -> bool:
    """Whether the verdict is about this candidate."""
    return bool(candidate["name"] == manifest["verdict"]["winner"])


def worst(y: Axis, mode: str) -> float:
    """Return the worst value that an axis holds."""
    return y.high if mode == "min" else y.low


def short(value: float) -> str:
    """Return a tick's label."""
    return number(value, ".6g")


def _levels(manifest: Manifest, y: Axis) -> list[Level]:
    labelled = {"latest", manifest["verdict"]["best_anchor"]}
    levels: list[Level] = []
    taken: list[float] = []
    for anchor in sorted(manifest["anchors"], key=lambda a: a["name"] not in labelled):
        name, value = anchor["name"], anchor["search"]["value"]
        if value is None:
            continue
        label_y = None
        if name in labelled:
            label_y = y.at(value) - 4
            if any(abs(label_y - other) < LABEL_HEIGHT for other in taken) or label_y < TOP + LABEL_HEIGHT:
                label_y = y.at(value) + LABEL_HEIGHT
            taken.append(label_y)
        levels.append(Level(y=y.at(value), hint=f"{name}: {number(value)}", label=name, label_y=label_y))
    return sorted(levels, key=lambda level: level.label_y is not None)  # no other line is drawn over a name


def _values(candidates: Sequence[dict[str, Any]]) -> list[float]:
    return [c["search"]["value"] for c in candidates if c["search"]["value"] is not None]
