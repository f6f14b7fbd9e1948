"""Brent's minimisation of one coordinate, asked and told.

Letters: N known points, in the order in which they were asked; x on the coordinate's own scale, lower values better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.checks import checked, require_fraction
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.study import require_one_objective

# The share of an interval that a golden section leaves out.
GOLDEN = (3 - math.sqrt(5)) / 2


class BrentSampler(BaseSampler):
    """Proposes the minimum of a parabola through the three best points, or a golden section where that is not safe.

    For a space of one coordinate, such as ``pairwise`` or ``Decay(max_extrapolation=0)``, and an objective with one
    valley. It keeps nothing of its own: all it needs is the study's trials, so an interrupted search goes on alike, and
    the anchors in the space, the end points of ``pairwise`` among them, are where it starts. A trial that another
    process is evaluating counts as bad until its value is known.

    Args:
        tolerance: Share of the coordinate's range, in logarithms where it is searched so, below which two points count
            as one; in (0, 1].

    Source:
        Brent 1973, *Algorithms for Minimization without Derivatives*, chapter 5, ``localmin``.
    """

    @checked()
    def __init__(self, *, tolerance: float = 1e-3) -> None:
        require_fraction("tolerance", tolerance, "The default is 0.001.")
        self._tolerance = tolerance

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the coordinate, once a trial has told which."""
        require_one_objective(study, self)
        shared = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: d for name, d in shared.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next point."""
        _require_one_coordinate(search_space)
        return {name: self._next(study, trial, name, d) for name, d in search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the first point of a search without anchors in the space."""
        _require_one_coordinate({**trial.distributions, param_name: param_distribution})
        return self._next(study, trial, param_name, param_distribution)

    def _next(self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution) -> Any:
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        scale, unscale = (math.log, math.exp) if distribution.log else (float, float)
        low, high = scale(distribution.low), scale(distribution.high)
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        trials = [
            t for t in study.get_trials(deepcopy=False, states=states) if name in t.params and t.number != trial.number
        ]
        x_N = [scale(t.params[name]) for t in trials]
        y_N = [math.inf if t.value is None else sign * t.value for t in trials]
        x = next_point(x_N, y_N, low, high, self._tolerance * (high - low))
        if isinstance(distribution, IntDistribution):
            return _nearest_new(unscale(x), {t.params[name] for t in trials}, distribution)
        # Rounding in and out of logarithms must not leave the range.
        return min(max(unscale(x), distribution.low), distribution.high)


def next_point(x_N: Sequence[float], y_N: Sequence[float], low: float, high: float, tolerance: float) -> float:
    """Return where to look next for the minimum in ``[low, high]``, given ``y_N`` at ``x_N``.

    >>> round(next_point([0.0, 1.0, 0.5], [0.09, 0.49, 0.04], 0.0, 1.0, 1e-3), 6)
    0.3
    """
    if not x_N:
        return low + GOLDEN * (high - low)
    points = sorted(zip(y_N, x_N, strict=True))
    x = points[0][1]
    a = max((other for other in x_N if other < x), default=low)
    b = min((other for other in x_N if other > x), default=high)
    step = _parabolic_step(points, a, b, tolerance) if len(points) >= 3 else None
    if step is None or abs(step) >= _step_before_last(x_N, y_N) / 2:
        step = GOLDEN * max(a - x, b - x, key=abs)
    if abs(step) < tolerance:
        step = math.copysign(tolerance, step)
    proposed = x + step if low <= x + step <= high else x - step
    return proposed if min(abs(proposed - x) for x in x_N) >= tolerance / 2 else _widest_gap(x_N, low, high)


def _parabolic_step(points: Sequence[tuple[float, float]], a: float, b: float, tolerance: float) -> float | None:
    """Return how far the vertex of a parabola through the three best is from the best, if it is in ``(a, b)``."""
    (y, x), (y_w, w), (y_v, v) = points[:3]
    if not all(map(math.isfinite, (y, y_w, y_v))):
        return None
    r, q = (x - w) * (y - y_v), (x - v) * (y - y_w)
    p, q = (x - v) * q - (x - w) * r, 2 * (r - q)
    if q == 0 or not a < x + p / q < b:
        return None
    step = p / q
    if min(x + step - a, b - x - step) < 2 * tolerance:
        # Next to what is known there is nothing to learn: look at the best point's other side.
        return math.copysign(tolerance, (a + b) / 2 - x)
    return step


def _widest_gap(x_N: Sequence[float], low: float, high: float) -> float:
    """Return the middle of the longest stretch that nobody has looked at: the valley is found, there may be others."""
    _, a, b = max((b - a, a, b) for a, b in itertools.pairwise(sorted([low, *x_N, high])))
    return (a + b) / 2


def _step_before_last(x_N: Sequence[float], y_N: Sequence[float]) -> float:
    """Return how far the last point but one lay from the best before it; a parabola must move less than half of it."""
    bests = itertools.accumulate(zip(y_N, x_N, strict=True), min)
    steps = [abs(x - best) for x, (_, best) in zip(x_N[1:], bests, strict=False)]
    return steps[-2] if len(steps) >= 2 else math.inf


def _nearest_new(x: float, known: set[int], distribution: IntDistribution) -> int:
    every = range(distribution.low, distribution.high + 1)
    return min((n for n in every if n not in known), key=lambda n: abs(n - x), default=round(x))


def _require_one_coordinate(search_space: dict[str, BaseDistribution]) -> None:
    names = [name for name, d in search_space.items() if not d.single()]
    if len(names) > 1 or any(isinstance(d, CategoricalDistribution) for d in search_space.values()):
        raise SearchError(
            f"`BrentSampler` searches one numeric coordinate, got {', '.join(names)}. "
            "Choose a space of one, such as `pairwise`, or leave `search.sampler` out."
        )
