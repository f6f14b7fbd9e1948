"""The refinement by gradients, on losses that are quadratic in a few weights: how far it comes, when it stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_ckmerge.config import Constraint
from lightning_ckmerge.core.outcome import Coefficients, Score
from lightning_ckmerge.core.spaces import ByTensor, Decay, Grouped, Space
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search import engine
from lightning_ckmerge.search import refine as refine_module
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.problem import Half, KeepGoing
from lightning_ckmerge.search.refine import FORWARDS_PER_GRADIENT, MAX_REFINED, refine
from lightning_ckmerge.search.stopping import Budget
from tests.support.paraboloid import SEGMENTS, make_search

K, NUM_WEIGHTS, NUM_BATCHES = len(SEGMENTS), 40, 10


@dataclass
class Valley:
    """A quadratic loss of merged weights, curved 10,000 times as much along some of them as along others.

    Args:
        groups: Each holds as many weights.
        sign: -1 for a metric of which more is better.
        frozen: No snapshot differs from another.
    """

    groups: tuple[str, ...] = ("",)
    sign: int = 1
    frozen: bool = False
    gradients: list[Coefficients] = field(default_factory=list)
    fault: Exception | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        steps = (
            0.0 if self.frozen else rng.normal(size=(len(self.groups), K, NUM_WEIGHTS)) * np.logspace(0, -1, K)[:, None]
        )
        self.snapshots_GKP = np.cumsum(np.ones((len(self.groups), K, NUM_WEIGHTS)) * steps, axis=1)
        self.curvature_P = np.logspace(-2, 2, NUM_WEIGHTS) / NUM_WEIGHTS
        self.lowest_GP = 0.4 * rng.normal(size=(len(self.groups), NUM_WEIGHTS)) + self.snapshots_GKP[:, K // 2 :].mean(
            1
        )

    def weights(self, c: Coefficients) -> Any:
        c_GK = [c[g] if isinstance(c, Mapping) else c for g in self.groups]
        return np.einsum("gk,gkp->gp", np.array(c_GK), self.snapshots_GKP)

    def loss(self, c: Coefficients) -> float:
        return float((self.curvature_P * (self.weights(c) - self.lowest_GP) ** 2).sum()) / 2

    def least(self) -> float:
        """The loss that no coefficients beat."""
        total = 0.0
        for snapshots_KP, lowest_P in zip(self.snapshots_GKP, self.lowest_GP, strict=True):
            root_P = np.sqrt(self.curvature_P)
            a_PJ = (root_P * (snapshots_KP[:-1] - snapshots_KP[-1])).T
            b_P = root_P * (lowest_P - snapshots_KP[-1])
            total += float(((a_PJ @ np.linalg.lstsq(a_PJ, b_P, rcond=None)[0] - b_P) ** 2).sum()) / 2
        return total

    def __call__(self, c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        values_B: list[float] = []
        while len(values_B) < NUM_BATCHES:
            values_B.append(self.sign * (self.loss(c) + math.sin(len(values_B))))
            if keep_going is not None and not keep_going(values_B, [1.0] * len(values_B)):
                break
        return Score(
            value=sum(values_B) / len(values_B),
            metrics={"gain": self.loss((0.0,) * (K - 1) + (1.0,)) - self.loss(c)},
            values_B=tuple(values_B),
            sizes_B=(1.0,) * len(values_B),
            num_batches=len(values_B),
            complete=len(values_B) == NUM_BATCHES,
        )

    def differentiate(self, c: Coefficients) -> dict[str, Any]:
        self.gradients.append(c)
        if self.fault is not None:
            raise self.fault
        g_GP = self.sign * self.curvature_P * (self.weights(c) - self.lowest_GP)
        found = {}
        for group, snapshots_KP, g_P in zip(self.groups, self.snapshots_GKP, g_GP, strict=True):
            vectors_KP = np.vstack([snapshots_KP[:-1] - snapshots_KP[-1], g_P])
            found[group] = vectors_KP @ vectors_KP.T
        return found


def searched(valley: Valley, tmp_path: Path, **options: Any) -> Search:
    space: Space = Decay()
    if len(valley.groups) > 1:
        space = Grouped(groups={"first": valley.groups[0]}, factors={"first": 1.5}).bind(valley.groups)
        space = ByTensor(space, valley.groups)
    search = make_search(valley, tmp_path / "journal", space=space, **options)
    search.run()
    return search


def added(search: Search) -> list[str]:
    return [t.candidate.name for t in search.trials if t.candidate.coordinates is None]


@pytest.mark.parametrize("groups", [("",), ("mlp", "head", "rest")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_gains_much_of_what_is_left(tmp_path: Path, groups: tuple[str, ...], sign: int) -> None:
    valley = Valley(groups=groups, sign=sign)
    search = searched(valley, tmp_path, mode="min" if sign == 1 else "max")
    before = valley.loss(search.winner.candidate.coefficients)
    assert refine(search, valley.differentiate) is None
    candidate = search.winner.candidate
    after = valley.loss(candidate.coefficients)
    assert before - after > 0.3 * (before - valley.least())
    assert len(valley.gradients) == 1
    assert added(search) == [f"refined-{i}" for i in range(len(added(search)))]
    assert len(added(search)) <= MAX_REFINED
    for c_K in (candidate.coefficients_K, *candidate.by_group.values()):
        assert math.fsum(c_K) == pytest.approx(1, abs=1e-12)
    assert set(candidate.by_group) == (set(groups) if len(groups) > 1 else set())


def test_coefficients_in_any_scale_of_the_weights_are_refined_alike(tmp_path: Path) -> None:
    """Goes red if a step's length depends on the weights' unit."""
    small, large = Valley(), Valley()
    large.snapshots_GKP, large.lowest_GP = 1e4 * small.snapshots_GKP, 1e4 * small.lowest_GP
    large.curvature_P = 1e-8 * small.curvature_P
    found = []
    for name, valley in (("small", small), ("large", large)):
        search = searched(valley, tmp_path / name)
        refine(search, valley.differentiate)
        found.append(search.winner.candidate.coefficients_K)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_what_gradients_take_is_counted(tmp_path: Path) -> None:
    valley = Valley()
    search = searched(valley, tmp_path)
    before, anchors = search.num_batches, len(search.anchors)
    refine(search, valley.differentiate)
    scored = sum(t.search.num_batches for t in search.trials if t.candidate.coordinates is None)
    assert search.num_batches == before + scored + FORWARDS_PER_GRADIENT * NUM_BATCHES * len(valley.gradients)
    assert search.seconds["gradients"] > 0
    assert len(search.anchors) == anchors


def test_without_anything_to_gain_nothing_is_tried(tmp_path: Path) -> None:
    valley = Valley(frozen=True)
    search = searched(valley, tmp_path)
    assert refine(search, valley.differentiate) is None
    assert added(search) == []
    assert search.winner is search.latest


@pytest.mark.parametrize("left_s", [39, 40, 45, 200])
def test_the_budget_holds_before_the_gradient_and_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float
) -> None:
    """A batch takes a second."""
    now = 0.0

    def evaluate(c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        nonlocal now
        score = valley(c, half, keep_going)
        now += score.num_batches
        return score

    def differentiate(c: Coefficients) -> dict[str, Any]:
        nonlocal now
        now += FORWARDS_PER_GRADIENT * NUM_BATCHES
        return valley.differentiate(c)

    valley = Valley()
    search = searched(valley, tmp_path)
    for module in (engine, refine_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    search.evaluate = evaluate
    search.budget = Budget(left_s, reason="search.timeout_s", clock=lambda: now)
    search.budget.spent(1, 1)
    refine(search, differentiate)
    assert now <= left_s
    assert bool(valley.gradients) == (left_s >= 40)
    if left_s < 200:
        assert search.stopped_early is not None
        assert "search.timeout_s" in search.stopped_early


def test_a_constraint_holds_for_what_is_refined_too(tmp_path: Path) -> None:
    valley = Valley()
    free = searched(valley, tmp_path / "free")
    limit = Constraint(monitor="gain", allowance=1.001 * free.winner.search.metrics["gain"])
    search = searched(valley, tmp_path / "bound", constraints=(limit,))
    refine(search, valley.differentiate)
    assert not all(t.feasible for t in search.trials)
    assert search.winner.feasible


def test_a_gradient_that_fails_leaves_the_search_as_it_was(tmp_path: Path) -> None:
    valley = Valley(fault=SearchError("no loss."))
    search = searched(valley, tmp_path)
    winner = search.winner
    assert refine(search, valley.differentiate, tolerant=True) == "no loss."
    valley.fault = RuntimeError("out of memory")
    assert refine(search, valley.differentiate, tolerant=True) == "RuntimeError: out of memory"
    assert search.winner is winner
    with pytest.raises(RuntimeError, match="out of memory"):
        refine(search, valley.differentiate)
