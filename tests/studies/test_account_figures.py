"""Figures of losses whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_ckmerge.studies.account.figures import LINE, Section, fit_budget
from tests.support.account_toy import C_K, SNAPSHOTS, bowl, make_account


def wells(w: Any) -> float:
    """Two wells at -1 and 1 with a wall of height 1 between them, along the first axis; along the others a bowl."""
    return 1.0 + float((w[0] ** 2 - 1) ** 2 + w[1] ** 2 + w[2] ** 2)


def test_a_bowl_has_no_barrier_and_its_best_place_is_found() -> None:
    """From (1, 1, 0) to (0, 1, 0): the loss is 3 + (1 - t)^2."""
    line = make_account(bowl, SNAPSHOTS, C_K)["figures"]["line"]
    assert line["values"] == pytest.approx([3 + (1 - t) ** 2 for t in LINE])
    assert (line["barrier"], line["best"], line["distance"]) == (0, 1, 1)


def test_a_wall_between_two_wells_is_a_barrier() -> None:
    """From (1, 0, 0) to (-1, 0, 0), by extrapolation: at t = 1/2 it stands 1 above both ends."""
    figure = make_account(wells, [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [0.0, 1.0 - 1e-9, 1e-9])
    line = figure["figures"]["line"]
    assert line["barrier"] == pytest.approx(1)
    assert "a barrier of 1 at 0.5" in line["sentence"]


def test_a_metric_that_is_to_be_high_is_told_alike() -> None:
    low, high = (make_account(f, SNAPSHOTS, C_K, mode=m) for f, m in ((bowl, "min"), (lambda w: -bowl(w), "max")))  # type: ignore[arg-type]
    assert high["gain"] == pytest.approx(low["gain"])
    assert high["figures"]["line"]["best"] == low["figures"]["line"]["best"]
    gains = [[row["gain"] for row in a["figures"]["snapshots"]["rows"]] for a in (low, high)]
    assert gains[0] == pytest.approx(gains[1])


def test_the_first_axis_alone_is_what_the_merge_gains_by() -> None:
    """All of the way lies in the embedding, which is the first number."""
    groups = {row["name"]: row for row in make_account(bowl, SNAPSHOTS, C_K)["figures"]["groups"]["rows"]}
    assert groups["embeddings"]["alone"] == pytest.approx(1)
    assert groups["embeddings"]["half_way"] == pytest.approx(0.75)
    assert groups["embeddings"]["way"] == pytest.approx(1)
    assert (groups["mlp"]["alone"], groups["attention"]["without"]) == (0, 0)


def test_a_snapshot_without_weight_contributes_nothing() -> None:
    rows = make_account(bowl, SNAPSHOTS, C_K)["figures"]["snapshots"]["rows"]
    assert (rows[0]["gain"], rows[0]["value"]) == (0, None)
    # Without either of the others the merge is the last one: 1 + 1 + 2, against 1 + 2.
    assert [rows[k]["gain"] for k in (1, 2)] == pytest.approx([1, 1])


def test_a_budget_serves_the_first_figures() -> None:
    sections = [Section(key=k, places={str(i): {} for i in range(n)}) for k, n in (("a", 3), ("b", 9), ("c", 1))]
    fitted, used = fit_budget(sections, 6)
    assert used == 6
    assert [s.left_out is None for s in fitted] == [True, False, True]
    assert fit_budget(sections, None)[1] == 15
