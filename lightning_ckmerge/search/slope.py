"""How fast a run still improves, and how many of its steps a gain is worth at that speed.

Letters: N points of a curve of validation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # type: ignore[import-untyped]

Point = tuple[int, float]

# The slope is that of a line through the last third of the run. Curves of training bend, so the line is steeper than
# the curve's end, and a gain is worth more steps than it says.
RECENT_SHARE = 1 / 3
MIN_POINTS = 3
CONFIDENCE = 0.95
# Half the interval's width, as a share of the slope: beyond it, "about 300 steps" would be anything from 200 to 600.
MAX_MARGIN = 0.5


@dataclass(frozen=True)
class Progress:
    """The monitored metric over a run.

    Args:
        step: Optimizer steps taken so far.
        curves: Steps and values of weights on the way, those of one curve measured on the same batches; the first curve
            that tells a slope counts.
    """

    step: int
    curves: tuple[Sequence[Point], ...] = ()

    def steps_worth(self, gain: float, sign: int) -> int | None:
        """Return how many further steps at the current slope gain as much, to two digits.

        Args:
            gain: Improvement, in the metric's unit.
            sign: 1 if lower values are better, -1 if higher ones are.

        Returns:
            ``None`` where the slope is not well known, the run no longer improves, or the steps would be more than have
            been taken: no line holds that far.
        """
        slopes = (current_slope(curve, self.step) for curve in self.curves)
        slope = next((s for s in slopes if s is not None), math.nan)
        steps = gain / (-sign * slope) if slope else math.nan
        if not 1 <= steps <= self.step:
            return None
        return int(float(f"{steps:.2g}"))


def current_slope(curve: Sequence[Point], step: int) -> float | None:
    """Return the change of a metric a step, over the last third of the first ``step`` steps.

    >>> round(current_slope([(600, 9.0), (700, 2.3), (800, 2.2), (900, 2.1)], 900), 6)
    -0.001

    Args:
        curve: Steps and values; of a step that was trained again, the last one counts.
        step: Steps so far.

    Returns:
        ``None`` for fewer than three points, or where its 95 % interval is wider than itself.
    """
    recent = sorted({s: v for s, v in curve if (1 - RECENT_SHARE) * step < s <= step}.items())
    num = len(recent)
    if num < MIN_POINTS:
        return None
    x_mean, y_mean = (math.fsum(column) / num for column in zip(*recent, strict=True))
    spread = math.fsum((x - x_mean) ** 2 for x, _ in recent)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in recent) / spread
    residual = math.fsum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in recent)
    standard_error = math.sqrt(residual / (num - 2) / spread)
    margin = float(stdtrit(num - 2, (1 + CONFIDENCE) / 2)) * standard_error
    return slope if margin <= MAX_MARGIN * abs(slope) else None
