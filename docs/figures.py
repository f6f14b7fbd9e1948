"""Draws the figures of ``how-it-works.md`` with the package's own retention policy and spaces, into ``docs/figures/``.

python -m docs.figures
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_ckmerge.buffer.retention import Drop, decide, pooled
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, exponential_kernel

FIGURES = Path(__file__).parent / "figures"
NUM_STEPS, FINEST, CAPACITY = 1000, 10, 10
LEFT, WIDTH = 90, 520
BLUE, ORANGE, GREY = "#2563c9", "#c2570c", "#5c6573"
TAU, BETA = 60.0, 1.0


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name, svg in figures().items():
        (FIGURES / name).write_text(svg, encoding="utf-8")


def figures() -> dict[str, str]:
    """Return each figure by its file's name."""
    return {"buffer.svg": buffer_figure(), "coefficients.svg": coefficients_figure()}


def buffered(num_steps: int) -> list[Segment]:
    """Return the default buffer's segments after so many steps of a run, oldest first."""
    segments: list[Segment] = []
    for last in range(FINEST, num_steps + 1, FINEST):
        segments.append(Segment(kind="mean", first_step=last - FINEST + 1, last_step=last))
        while (action := decide(segments, capacity=CAPACITY, layout="geometric", finest=FINEST)) is not None:
            i = action.index
            segments[i : i + 2] = [segments[i + 1]] if isinstance(action, Drop) else [pooled(*segments[i : i + 2])]
    return segments


def buffer_figure() -> str:
    """Return the buffer at several moments of a run: a row each, a box a snapshot."""
    moments = (100, 200, 400, 700, NUM_STEPS)
    parts = []
    for row, moment in enumerate(moments):
        y = 12 + 30 * row
        parts.append(text(LEFT - 10, y + 14, f"step {moment}", anchor="end"))
        parts += [box(s, y, 20, BLUE, opacity=0.75) for s in buffered(moment)]
    y = 12 + 30 * len(moments)
    return picture([*parts, *steps_axis(y)], y + 24)


def coefficients_figure() -> str:
    """Return three merges of the last buffer: how much a step of each snapshot weighs."""
    segments_K = buffered(NUM_STEPS)
    merges = {
        "uniform mean": exponential_kernel(segments_K, float("inf")),
        f"EMA, tau {TAU:g}": exponential_kernel(segments_K, TAU),
        f"decay, beta {BETA:g}": Decay().coefficients({"tau": TAU, "beta": BETA}, segments_K),
    }
    parts = []
    for row, (name, c_K) in enumerate(merges.items()):
        zero = 74 + 92 * row
        densities = [c / s.num_steps for c, s in zip(c_K, segments_K, strict=True)]
        scale = 60 / max(densities)
        parts.append(text(LEFT - 10, zero, name, anchor="end"))
        for segment, density in zip(segments_K, densities, strict=True):
            height = abs(scale * density)
            y = zero - height if density >= 0 else zero
            parts.append(box(segment, y, height, BLUE if density >= 0 else ORANGE))
        parts.append(f'<path d="M{LEFT} {zero}h{WIDTH}" stroke="{GREY}"/>')
    y = 74 + 92 * (len(merges) - 1) + 20
    return picture([*parts, *steps_axis(y)], y + 24)


def box(segment: Segment, y: float, height: float, colour: str, opacity: float = 1.0) -> str:
    """Return a box as wide as the segment."""
    start = x(segment.first_step - 1)
    width = max(0.5, x(segment.last_step) - start - 1)
    return (
        f'<rect x="{start:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}" '
        f'fill-opacity="{opacity}"/>'
    )


def steps_axis(y: float) -> Iterator[str]:
    """Yield the labels of the training steps."""
    for step in range(0, NUM_STEPS + 1, 200):
        yield text(x(step), y + 14, str(step), anchor="middle", colour=GREY)


def text(at: float, y: float, content: str, *, anchor: str, colour: str = "#111") -> str:
    """Return a label."""
    return f'<text x="{at:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{content}</text>'


def x(step: int) -> float:
    """Return where a step lies."""
    return LEFT + WIDTH * step / NUM_STEPS


def picture(parts: Sequence[str], height: float) -> str:
    """Return an SVG that looks the same on light and dark pages."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height:.0f}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
