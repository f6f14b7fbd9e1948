"""The Pareto front of several objectives, and its knee.

Letters: N candidates, F of them on the front; M objectives, of all of which lower values are better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(values_NM: Sequence[Sequence[float]]) -> list[int]:
    """Return which candidates no other one beats; of equal ones the first.

    >>> pareto_front([(1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
    [0, 1, 3]

    Args:
        values_NM: N rows of M finite values.
    """
    return [
        n
        for n, row in enumerate(values_NM)
        if not any(_beats(other, row) or (other == row and o < n) for o, other in enumerate(values_NM))
    ]


def knee(values_FM: Sequence[Sequence[float]]) -> int:
    """Return the point of the front that lies furthest from the plane through its extremes, towards better values.

    Each objective is scaled by its range over the front, so that its unit does not matter. Then the plane's normal is
    ``(1, ..., 1)``, and the furthest point is that of the least sum; of equals the first. Of two points, which are both
    extremes, no one is a knee: the first counts.

    >>> knee([(0.0, 9.0), (1.0, 2.0), (2.0, 1.5), (6.0, 0.0)])
    1

    Args:
        values_FM: F rows of M finite values, none of which beats another.

    Source:
        Das 1999, "On characterizing the 'knee' of the Pareto curve based on Normal-Boundary Intersection",
        *Structural Optimization* 18, 107-115.
    """
    columns = list(zip(*values_FM, strict=True))
    low_M, range_M = [min(c) for c in columns], [max(c) - min(c) for c in columns]

    def scaled_sum(row: Sequence[float]) -> float:
        return math.fsum((v - low) / r for v, low, r in zip(row, low_M, range_M, strict=True) if r > 0)

    return min(range(len(values_FM)), key=lambda f: round(scaled_sum(values_FM[f]), 12))


def spread(values_F: Sequence[float], keep: int, num: int) -> list[int]:
    """Return at most ``num`` points that lie evenly along the front, both ends and ``keep`` among them.

    >>> spread([0.0, 0.1, 0.2, 5.0, 10.0], keep=1, num=4)
    [0, 1, 3, 4]

    Args:
        values_F: F values of one objective.
        keep: A point that stays.
        num: At least 3.
    """
    chosen = list(dict.fromkeys((keep, *(f(range(len(values_F)), key=values_F.__getitem__) for f in (min, max)))))
    while len(chosen) < min(num, len(values_F)):
        others = [f for f in range(len(values_F)) if f not in chosen]
        chosen.append(max(others, key=lambda f: min(abs(values_F[f] - values_F[c]) for c in chosen)))
    return sorted(chosen)


def _beats(ours_M: Sequence[float], theirs_M: Sequence[float]) -> bool:
    """Whether nothing of ours is worse and something better."""
    return ours_M != theirs_M and all(a <= b for a, b in zip(ours_M, theirs_M, strict=True))
