"""The derivatives that a refinement is given, beside quotients of differences of the search's own scores."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ckmerge import pipeline
from lightning_ckmerge.search.engine import Search

STEP = 0.02
# Each quotient takes two evaluations.
EVERY = 4


def compare_slopes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, float]]]:
    """Return a list, filled by the next searches, of derivatives and quotients for each group and every fourth
    snapshot."""
    found: dict[str, list[tuple[float, float]]] = {}

    def compare(search: Search, differentiate: Any, tolerant: bool) -> None:
        candidate = search.winner.candidate
        products = differentiate(candidate.coefficients)
        own = {g: list(candidate.by_group.get(g, candidate.coefficients_K)) for g in products}

        def value(group: str, k: int, step: float) -> float:
            c_K = own[group].copy()
            c_K[k] += step
            c_K[-1] -= step
            c = {**own, group: c_K} if len(own) > 1 else c_K
            return search.evaluate(c, "search").value

        for group, products_KK in products.items():
            for k in range(0, len(products_KK) - 1, EVERY):
                quotient = (value(group, k, STEP) - value(group, k, -STEP)) / (2 * STEP)
                found.setdefault(group, []).append((float(products_KK[-1, k]), quotient))

    monkeypatch.setattr(pipeline, "refine", compare)
    return found
