from __future__ import annotations

import pytest

from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.pilot.plan import MAX_CONFIRMED, Merge, between, make_plan, mean, single, spread


@pytest.mark.parametrize("num", [2, 3, 10, 200])
@pytest.mark.parametrize("limit", [22, 60, 300])
def test_a_thinned_plan_keeps_to_its_limit_and_uses_it(num: int, limit: int) -> None:
    """Goes red if a part is counted twice, or if what the map leaves over is lost."""
    plan, whole = make_plan(num, limit), make_plan(num)
    assert plan.num_evaluations == len(plan.known) + len(plan.pairs) + MAX_CONFIRMED <= limit
    if plan != whole:
        assert plan.num_evaluations >= 0.9 * limit
    assert {0, num - 1} <= set(plan.mapped)
    assert {between(i, num - 1, 0.5) for i in plan.mapped[:-1]} <= set(plan.known)


def test_a_thinned_map_holds_neighbours_and_distant_pairs() -> None:
    gaps = {newer - older for older, newer in make_plan(100, 150).pairs}
    assert {1, 99} <= gaps
    assert any(3 <= gap <= 10 for gap in gaps)
    assert any(20 <= gap <= 60 for gap in gaps)


def test_nothing_is_scored_twice() -> None:
    known = make_plan(9).known
    assert len(known) == len(set(known)) == len({m.key() for m in known})


def test_a_limit_below_the_least_is_refused_with_the_least() -> None:
    with pytest.raises(ConfigError, match=r"`max_evaluations >= (\d+)` must hold for a study of 12") as error:
        make_plan(12, 3)
    least = int(str(error.value).split(">= ")[1].split("`")[0])
    assert make_plan(12, least).num_evaluations <= least
    with pytest.raises(ConfigError, match="must hold"):
        make_plan(12, least - 1)


@pytest.mark.parametrize("num", [1, 2, 3, 7, 30])
def test_spread_is_an_order(num: int) -> None:
    assert sorted(spread(num)) == list(range(num))


@pytest.mark.parametrize("merge", make_plan(4).known, ids=Merge.key)
def test_coefficients_sum_to_one(merge: Merge) -> None:
    assert sum(merge.coefficients(4)) == pytest.approx(1)


def test_equal_merges_are_one() -> None:
    assert between(1, 3, 0.5) == mean([1, 3])
    assert between(1, 3, 0.0, "slerp") == between(1, 2, 0.0) == single(1)
    assert between(1, 3, 0.5, "slerp") != mean([1, 3])


def test_without_circles_there_are_none() -> None:
    assert {m.path for m in make_plan(6, slerp=False).known} == {"linear"}
