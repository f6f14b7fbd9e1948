"""The protocol's statistics.

Letters: N runs; D slopes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, t  # type: ignore[import-untyped]

CONFIDENCE = 0.95
Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's 95 % interval of the mean, of three values or more.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    if len(values) < 3:
        return None
    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - margin, float(np.mean(values)) + margin


def proportion_interval(num: int, total: int) -> Interval:
    """Return Clopper and Pearson's 95 % interval of a probability.

    >>> low, high = proportion_interval(0, 100)
    >>> low, round(high, 3)
    (0.0, 0.036)
    """
    if total == 0:
        return 0.0, 1.0
    tail = (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, num, total - num + 1)) if num else 0.0
    high = float(beta.ppf(1 - tail, num + 1, total - num)) if num < total else 1.0
    return low, high


@dataclass(frozen=True)
class Slope:
    """A fitted slope and its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Trend:
    """A plane through values over D coordinates.

    Args:
        level: The plane's value where all coordinates are 0.
        slopes_D: In the values' unit, by unit of each coordinate.
        residual: Standard deviation around the plane.
        num_runs: Values that it was fitted to.
    """

    level: Slope
    slopes_D: tuple[Slope, ...]
    residual: float
    num_runs: int


def trend(x_ND: Sequence[Sequence[float]], values_N: Sequence[float]) -> Trend | None:
    """Return the plane of least squares, with Student's intervals; ``None`` where the runs do not determine it."""
    design = np.column_stack([np.ones(len(values_N)), np.asarray(x_ND, float).reshape(len(values_N), -1)])
    num, free = design.shape
    if num <= free or np.linalg.matrix_rank(design) < free:
        return None
    found, *_ = np.linalg.lstsq(design, np.asarray(values_N, float), rcond=None)
    residual = math.sqrt(float(((values_N - design @ found) ** 2).sum()) / (num - free))
    errors = residual * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, num - free))
    level, *slopes = (
        Slope(float(v), (float(v - quantile * e), float(v + quantile * e))) for v, e in zip(found, errors, strict=True)
    )
    return Trend(level, tuple(slopes), residual, num)
