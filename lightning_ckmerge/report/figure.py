"""The report's two main charts as one Matplotlib figure, for loggers that take pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_ckmerge.report.charts import value_axis
from lightning_ckmerge.report.text import Manifest, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2563c9", "#c2570c", "#17713f", "#5c6573"


def draw_search(manifest: Manifest) -> Figure | None:
    """Return coefficients over training steps beside the search's history; ``None`` without Matplotlib.

    The figure has no window and belongs to no global state.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"Merge at step {count(manifest['step'])}: {manifest['verdict']['status']}")
    left, right = figure.subplots(1, 2)
    for snapshot, c in zip(manifest["snapshots"], manifest["coefficients"], strict=True):
        start = snapshot["first_step"] - 1
        left.bar(start, c, snapshot["last_step"] - start, align="edge", color=BLUE if c >= 0 else ORANGE, edgecolor="w")
    left.axhline(0, color=GREY, linewidth=0.8)
    left.set(xlabel="step", ylabel="coefficient", title="Coefficients over training steps")
    _draw_history(right, manifest)
    return figure


def _draw_history(axes: Axes, manifest: Manifest) -> None:
    named, winner = {"latest", manifest["verdict"]["best_anchor"]}, manifest["verdict"]["winner"]
    for anchor in manifest["anchors"]:
        if (value := anchor["search"]["value"]) is not None:
            is_named = anchor["name"] in named
            axes.axhline(value, color=GREY, linestyle="--" if is_named else ":", linewidth=1.2 if is_named else 0.8)
            if is_named:
                axes.annotate(anchor["name"], (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    for i, trial in enumerate(manifest["trials"], start=1):
        if (value := trial["search"]["value"]) is not None:
            colour = GREEN if trial["name"] == winner else BLUE
            axes.plot(i, value, "o", color=colour, fillstyle="full" if trial["search"]["complete"] else "none")
    if (scale := value_axis(manifest)) is not None:
        axes.set_ylim(scale.low, scale.high)
    axes.set(xlabel="trial", ylabel=manifest["monitor"], title="Search half")
