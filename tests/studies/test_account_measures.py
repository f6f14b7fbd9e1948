"""Curvature, agreement, importances and stability, each where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.studies.account.agreement import compare, labels_of
from lightning_ckmerge.studies.account.curvature import MAX_PRODUCTS, find_curvature
from lightning_ckmerge.studies.account.importance import find_importances
from lightning_ckmerge.studies.account.stability import mean_age, searches, shift


@pytest.mark.parametrize("size", [5, 200])
def test_the_curvature_of_a_known_matrix(size: int) -> None:
    """Written out where it is small, by Lanczos and probes where it is not."""
    random = np.random.default_rng(0)
    rotation = np.linalg.qr(random.standard_normal((size, size)))[0]
    eigenvalues = np.concatenate([[-30.0], np.linspace(0, 1, size - 2), [7.0]])
    matrix = rotation @ np.diag(eigenvalues) @ rotation.T
    found = find_curvature(lambda v: matrix @ v, size)
    assert found.top == pytest.approx(7.0, rel=0.01)
    assert abs(found.trace - eigenvalues.sum()) <= 4 * found.trace_error + 1e-9
    assert found.num_products <= MAX_PRODUCTS
    assert (found.trace_error == 0) == (size == 5)


def test_flips_are_counted_where_there_is_a_label() -> None:
    """Right: both 2, second alone 3, first alone 1, none 1; one label is to be ignored."""
    truth = torch.tensor([0, 0, 1, 1, 1, 2, 0, -100])
    before = torch.tensor([0, 0, 0, 0, 0, 2, 1, 0])
    after = torch.tensor([0, 0, 1, 1, 1, 0, 2, 1])
    found = compare([before[:4], before[4:]], [after[:4], after[4:]], [truth[:4], truth[4:]])
    assert (found.num, found.both, found.won, found.lost) == (7, 2, 3, 1)
    assert found.same == pytest.approx(2 / 7)
    assert found.p_value == pytest.approx(2 * (4 + 1) / 16)
    assert compare([before], [after], [None]).won is None


def test_logits_and_labels_are_told_apart() -> None:
    logits = torch.tensor([[[0.0, 2.0], [3.0, 1.0]]])
    assert torch.equal(labels_of(logits)[0], torch.tensor([1, 0]))
    assert torch.equal(labels_of(torch.tensor([[1, 0]]))[0], torch.tensor([1, 0]))
    with pytest.raises(ConfigError, match="a label for each prediction, got 1 for 2"):
        labels_of((logits, torch.tensor([1])))
    with pytest.raises(ConfigError, match="got str"):
        labels_of("yes")


def scored(x: float, y: float, value: float | None) -> dict[str, Any]:
    return {
        "name": "trial",
        "coordinates": {"x": x, "y": y},
        "search": {"value": value, "complete": True},
        "feasible": True,
    }


def test_the_coordinate_that_moves_the_value_is_the_important_one() -> None:
    random = np.random.default_rng(0)
    trials = [scored(x, y, 4 * x * x + 0.1 * y) for x, y in random.uniform(-1, 1, (24, 2))]
    manifest = {"anchors": [], "trials": trials, "mode": "min"}
    shares, reason = find_importances(manifest)
    assert reason is None
    assert shares is not None
    assert next(iter(shares)) == "x"
    assert shares["x"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert find_importances({**manifest, "trials": trials[:5]})[1] is not None
    alone = [{**t, "coordinates": {"x": t["coordinates"]["x"]}} for t in trials]
    assert "fewer than two" in str(find_importances({**manifest, "trials": alone})[1])


def search_at(step: int, ages: dict[int, float], kind: str = "point") -> dict[str, Any]:
    return {
        "step": step,
        "snapshots": [{"kind": kind, "first_step": step - a, "last_step": step - a} for a in ages],
        "coefficients": list(ages.values()),
        "coordinates": {"tau": 5.0},
        "verdict": {"status": "accepted", "winner": "trial-1"},
    }


def test_coefficients_that_age_with_the_run_have_not_moved() -> None:
    first, later = search_at(100, {40: 0.5, 0: 0.5}), search_at(1000, {400: 0.5, 0: 0.5})
    assert shift(first, later) == pytest.approx(0, abs=1e-3)
    assert (mean_age(first), mean_age(later)) == (20, 200)


def test_a_shift_is_how_far_the_weight_has_moved() -> None:
    """Half of it moves by 0.2 of the run; coefficients below 0 are no obstacle."""
    a, b = search_at(100, {40: 0.5, 0: 0.5}), search_at(100, {60: 0.5, 0: 0.5})
    assert shift(a, b) == pytest.approx(0.1, abs=1e-3)
    c, d = search_at(100, {40: -0.5, 0: 1.5}), search_at(100, {60: -0.5, 0: 1.5})
    assert shift(c, d) == pytest.approx(0.1, abs=1e-3)
    rows = searches([b, a])
    assert [row["shift"] is None for row in rows] == [True, False]
    assert rows[0]["age_share"] == pytest.approx(0.3)
