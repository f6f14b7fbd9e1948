"""Refine a search's winner by a gradient: free coefficients for each tensor, along the steepest line from the winner.

The loss is nearly quadratic in the coefficients, so one gradient and two evaluations tell the line's best place; but it
is curved 100,000 times as much along some directions as along others, which one gradient does not tell. Coordinates in
which the snapshots lie about equally far apart help. Free coefficients of each tensor overfit a small search half where
many steps are taken; of one step they keep most of what they gain on other data.

Letters: K snapshots, oldest first; G groups; N coordinates, at most ``G (K - 1)``, since coefficients sum to 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_ckmerge.core.outcome import Candidate, Coefficients, Scored
from lightning_ckmerge.errors import SkipError, explain
from lightning_ckmerge.search.engine import Search

# The first length of the step is a guess, which the evaluation there corrects.
MAX_REFINED = 3
MAX_CHANGE = 30.0
# One and a half times the best length has 3/4 of its gain, and half of it has as much.
FAR = 1.5
# Along the first gradient the loss was curved 1.8 and 2.2 times as much as towards the steepest other candidate.
STEEPNESS = 2.0
# Of squared distances, relative to the largest: nearer points tell more of rounding than of curvature.
NEAR = 1e-3
# A pass forward and backward takes about three times as long as one forward.
FORWARDS_PER_GRADIENT = 3
MAX_EVALUATIONS = FORWARDS_PER_GRADIENT + MAX_REFINED
# Squared distances, relative to the largest, that are taken for rounding.
ROUNDING = 1e-10

Array = NDArray[np.float64]


class Differentiate(Protocol):
    """Differentiates the search half's value; the same batches and random numbers as when it is scored."""

    def __call__(self, c: Coefficients) -> Mapping[str, Array]:
        """Return for each group the inner products ``(K, K)`` of ``core.merge``, of the derivatives at ``c``.

        With several ranks it raises on all of them, or on none.
        """


def refine(search: Search, differentiate: Differentiate, *, tolerant: bool = False) -> str | None:
    """Add candidates downhill of the winner to a search that has run: ``refined-0``, and up to two more.

    Each but the first lies where the parabola along the line has its minimum, as the last one tells.

    Args:
        search: By one metric.
        differentiate: Its gradient.
        tolerant: Whether a gradient that fails ends the refinement, and not the search.

    Returns:
        Why the gradient failed, if it did.
    """
    if not search.affords(FORWARDS_PER_GRADIENT + 1):
        return None
    try:
        products = _timed(search, differentiate, search.winner)
    except Exception as error:  # on all ranks
        if not tolerant or isinstance(error, SkipError):
            raise
        return explain(error)
    plane = _Plane(search.winner, products)
    g_N = search.problem.sign * plane.gradient(products)
    curvature = _curvature(search, plane, g_N)
    if curvature > 0:  # else nothing moves
        _descend(search, plane, g_N, curvature)
    return None


def _timed(search: Search, differentiate: Differentiate, scored: Scored) -> Mapping[str, Array]:
    """Return the gradient at a scored candidate, and count its time."""
    num_batches = FORWARDS_PER_GRADIENT * search.latest.search.num_batches
    start = time.monotonic()
    products = differentiate(scored.candidate.coefficients)
    elapsed = time.monotonic() - start
    search.seconds["gradients"] = search.seconds.get("gradients", 0.0) + elapsed
    search.budget.spent(elapsed, num_batches)
    search.gradient_batches += num_batches
    return products


class _Plane:
    """All coefficients, as coordinates around one merge in which the snapshots lie about equally far apart."""

    def __init__(self, origin: Scored, products: Mapping[str, Array]) -> None:
        self._groups = list(products)
        self._origin = {group: _of_group(origin, group) for group in self._groups}
        self._bases = {}
        self._inverses = {}
        for group, products_KK in products.items():
            squares, vectors = np.linalg.eigh(products_KK[:-1, :-1])
            kept = squares > ROUNDING * max(squares[-1], 0.0)
            # Halfway between the coefficients themselves and coordinates in which distances are those of the weights.
            self._bases[group] = vectors[:, kept] * squares[kept] ** -0.25
            self._inverses[group] = vectors[:, kept] * squares[kept] ** 0.25

    def gradient(self, products: Mapping[str, Array]) -> Array:
        """Return the value's derivatives by the coordinates."""
        return np.concatenate([self._bases[group].T @ products[group][-1, :-1] for group in self._groups])

    def place(self, scored: Scored) -> Array:
        """Return a candidate's coordinates; the origin's are 0."""
        moved = {group: _of_group(scored, group) - self._origin[group] for group in self._groups}
        return np.concatenate([self._inverses[group].T @ moved[group][:-1] for group in self._groups])

    def candidate(self, name: str, x_N: Array) -> Candidate:
        """Return the candidate at these coordinates."""
        ends = np.cumsum([basis.shape[1] for basis in self._bases.values()])
        found = {}
        for group, part in zip(self._groups, np.split(x_N, ends[:-1]), strict=True):
            others = self._origin[group][:-1] + self._bases[group] @ part
            found[group] = (*others.tolist(), 1.0 - math.fsum(others))
        mean_K = np.mean(list(found.values()), axis=0).tolist()
        return Candidate(name=name, coefficients_K=tuple(mean_K), by_group=found if len(found) > 1 else {})


def _curvature(search: Search, plane: _Plane, g_N: Array) -> float:
    """Return the curvature to expect along the gradient, from the losses of other candidates; 0 where nothing moves."""
    found = []
    for scored in (*search.anchors, *search.trials):
        moved_N = plane.place(scored)
        rise = _loss(search, scored) - _loss(search, search.winner) - float(g_N @ moved_N)
        found.append((float(moved_N @ moved_N), rise))
    nearest = NEAR * max(square for square, _ in found)
    curvatures = [2 * rise / square for square, rise in found if square > nearest and math.isfinite(rise)]
    return STEEPNESS * max(curvatures, default=0.0)


def _descend(search: Search, plane: _Plane, g_N: Array, curvature: float) -> None:
    """Try lengths of a step against the gradient; each but the first is where the last one tells the minimum."""
    start, slope, length = _loss(search, search.winner), -float(g_N @ g_N) / curvature, 1.0
    for i in range(MAX_REFINED):
        if i and not search.affords():
            return
        candidate = plane.candidate(f"refined-{i}", -length / curvature * g_N)
        # Rank 0's bits, on every rank.
        scored = search.add(search.agree(lambda candidate=candidate: candidate))  # type: ignore[misc]
        rise = _loss(search, scored) - start - slope * length
        best = -slope * length**2 / (2 * rise) if rise > 0 else length * MAX_CHANGE
        best = best if math.isfinite(best) else 0.0
        if scored is search.winner and length / FAR <= best <= length * FAR:
            return
        length = min(max(best, length / MAX_CHANGE), length * MAX_CHANGE)


def _loss(search: Search, scored: Scored) -> float:
    return search.problem.sign * scored.search.value


def _of_group(scored: Scored, group: str) -> Array:
    candidate = scored.candidate
    return np.array(candidate.by_group.get(group, candidate.coefficients_K))
