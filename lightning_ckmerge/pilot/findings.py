"""What a pilot study found, as the plain data of ``study.json``.

Letters: K checkpoints, oldest first; U = K - 1 updates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.pilot.plan import Merge, mean, single
from lightning_ckmerge.pilot.study import NEWEST, Scores
from lightning_ckmerge.search.interval import score_gain

Found = dict[str, Any]


def find(scores: Scores, steps_K: Sequence[int]) -> Found:
    """Return the answers to the three questions, and the finalists.

    Args:
        scores: What was scored.
        steps_K: The checkpoints' steps.
    """
    return {
        "mapped": list(scores.plan.mapped),
        "checkpoints_scored": [
            {"place": k, "step": steps_K[k], "value": finite(scores.search[single(k)].value)}
            for k in scores.plan.mapped
        ],
        "pairs": [_pair(scores, older, newer, steps_K) for older, newer in scores.plan.pairs],
        "means": _means(scores, steps_K),
        "lines": [_line(scores, older, newer, steps_K) for older, newer in scores.plan.lines],
        "finalists": _finalists(scores, steps_K),
    }


def by_distance(pairs: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the median gain of the pairs over the better checkpoint at each distance in steps, the nearest first."""
    gains: dict[int, list[float]] = {}
    for pair in pairs:
        if pair["gain_over_better"] is not None:
            gains.setdefault(pair["steps"], []).append(pair["gain_over_better"])
    return sorted((steps, statistics.median(found)) for steps, found in gains.items())


def told(merge: Mapping[str, Any], steps_K: Sequence[int]) -> str:
    """Return a merge in words.

    >>> told({"places": [0, 2], "weights": [0.25, 0.75], "path": "linear"}, [10, 20, 30])
    'steps 10 and 30 at `lam` 0.75'
    >>> told({"places": [0, 1, 2], "weights": [1 / 3] * 3, "path": "linear"}, [10, 20, 30])
    'the mean of 3 checkpoints, steps 10 to 30'
    """
    steps = [steps_K[k] for k in merge["places"]]
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) == 2:
        on_circle = " on the great circle" if merge["path"] == "slerp" else ""
        return f"steps {steps[0]} and {steps[1]} at `lam` {merge['weights'][-1]:.4g}{on_circle}"
    return f"the mean of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}"


def finite(value: float | None) -> float | None:
    """Return a value that JSON can hold."""
    return value if value is not None and math.isfinite(value) else None


def _pair(scores: Scores, older: int, newer: int, steps_K: Sequence[int]) -> Found:
    best = scores.best_of_pair(older, newer)
    better = min(single(older), single(newer), key=scores.badness)
    return {
        "older": older,
        "newer": newer,
        "steps": steps_K[newer] - steps_K[older],
        "lam": best.lam,
        "value": finite(scores.search[best].value),
        "gain_over_better": scores.gain(best, better),
        "gain_over_newest": scores.gain(best, single(scores.plan.num_checkpoints - 1)),
    }


def _means(scores: Scores, steps_K: Sequence[int]) -> list[Found]:
    num = scores.plan.num_checkpoints
    found = []
    for window in scores.plan.windows:
        places = window.places(num)
        merge = mean(places)
        found.append(
            {
                "num": window.num,
                "stride": window.stride,
                "steps": steps_K[places[-1]] - steps_K[places[0]],
                "value": finite(scores.search[merge].value),
                "gain": scores.gain(merge, single(num - 1)),
            }
        )
    return found


def _line(scores: Scores, older: int, newer: int, steps_K: Sequence[int]) -> Found:
    """All that was scored along a pair; where they part, the great circle and the straight line share their ends."""

    def along(path: str) -> list[list[float | None]]:
        inside = [m for m in scores.search if m.places == (older, newer) and m.path == path]
        points = [(m.lam, scores.search[m].value) for m in inside]
        ends = [(float(lam), scores.search[single(k)].value) for lam, k in ((0, older), (1, newer)) if has(k)]
        return [[lam, finite(value)] for lam, value in sorted([*points, *ends])] if inside else []

    def has(place: int) -> bool:
        return single(place) in scores.search

    return {
        "older": older,
        "newer": newer,
        "steps": steps_K[newer] - steps_K[older],
        "linear": along("linear"),
        "slerp": along("slerp"),
    }


def _finalists(scores: Scores, steps_K: Sequence[int]) -> list[Found]:
    newest = next(f for f in scores.finalists if f.name == NEWEST)
    found = []
    for finalist in scores.finalists:
        gain, interval = _gain(finalist.confirm, newest.confirm, scores.sign, is_newest=finalist is newest)
        merge = recipe(finalist.merge)
        found.append(
            {
                "name": finalist.name,
                "merge": merge,
                "told": told(merge, steps_K),
                "search": finite(finalist.search.value),
                "search_gain": scores.gain(finalist.merge, newest.merge),
                "confirm": finite(finalist.confirm.value) if finalist.confirm is not None else None,
                "gain": gain,
                "interval": interval,
                "num_differences": len(finalist.confirm.values_B or ()) if finalist.confirm is not None else 0,
            }
        )
    return found


def recipe(merge: Merge) -> Found:
    """Return a merge as data."""
    return {"places": list(merge.places), "weights": list(merge.weights), "path": merge.path}


def _gain(
    ours: Score | None, theirs: Score | None, sign: int, *, is_newest: bool
) -> tuple[float | None, list[float] | None]:
    if ours is None or theirs is None:
        return None, None
    if is_newest:
        return 0.0, None
    gain, interval = score_gain(ours, theirs, sign)
    return finite(gain), list(interval) if interval is not None and all(map(math.isfinite, interval)) else None
