"""The report's two main charts as one Matplotlib figure, for loggers that take pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.report.charts import value_axis, weights_per_step
from lightning_ckmerge.report.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2563c9", "#c2570c", "#17713f", "#5c6573"


def draw_search(manifest: Manifest) -> Figure | None:
    """Return the winner's weights over training steps beside the search's history; ``None`` without Matplotlib.

    The figure has no window and belongs to no global state.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"Merge at step {count(manifest['step'])}: {manifest['verdict']['status']}")
    left, right = figure.subplots(1, 2)
    weights, unit = weights_per_step(manifest)
    narrowest = 0.01 * max(s["last_step"] for s in manifest["snapshots"])
    for snapshot, weight in zip(manifest["snapshots"], weights, strict=True):
        start = snapshot["first_step"] - 1
        width = max(snapshot["last_step"] - start, narrowest)
        left.bar(start, weight, width, align="edge", color=BLUE if weight >= 0 else ORANGE, edgecolor="w")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="step", ylabel=unit, title="What the merge is made of")
    _draw_history(right, manifest)
    return figure


def _draw_history(axes: Axes, manifest: Manifest) -> None:
    named, winner = {"latest", manifest["verdict"]["best_anchor"]}, manifest["verdict"]["winner"]
    values = {a["name"]: v for a in manifest["anchors"] if (v := a["search"]["value"]) is not None}
    for name, value in values.items():
        is_named = name in named
        axes.axhline(value, color=GREY, linestyle="--" if is_named else ":", linewidth=1.2 if is_named else 0.8)
    # Beside the frame, the upper one above its line and the lower one below, where neither meets a mark or the other.
    ordered = sorted(named & values.keys(), key=lambda name: -values[name])
    for name, side, up in zip(ordered, ("bottom", "top"), (1, -1), strict=False):
        axes.annotate(
            name,
            (1, values[name]),
            (4, up),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left",
            va=side,
            annotation_clip=False,
        )
    for i, trial in enumerate(manifest["trials"], start=1):
        if (value := trial["search"]["value"]) is not None:
            colour = GREEN if trial["name"] == winner else BLUE
            axes.plot(i, value, "o", color=colour, fillstyle="full" if trial["search"]["complete"] else "none")
    if (scale := value_axis(manifest)) is not None:
        axes.set_ylim(scale.low, scale.high)
    axes.set(xlabel="trial", ylabel=manifest["monitor"], title="Search half")
