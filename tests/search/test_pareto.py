"""The front and its knee, by their definitions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.search.pareto import knee, pareto_front, spread

values = st.integers(-20, 20).map(float)
rows = st.integers(1, 3).flatmap(lambda m: st.lists(st.tuples(*[values] * m), min_size=1, max_size=20))


def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


@given(rows)
def test_the_front_holds_just_what_nothing_beats_each_once(table: list[tuple[float, ...]]) -> None:
    front = pareto_front(table)
    assert {table[n] for n in front} == {row for row in table if not any(beats(other, row) for other in table)}
    assert front == sorted({table.index(table[n]) for n in front})


@given(rows)
def test_of_one_objective_the_front_is_the_best(table: list[tuple[float, ...]]) -> None:
    column = [row[:1] for row in table]
    assert pareto_front(column) == [column.index(min(column))]


def test_the_knee_of_a_quarter_circle_is_its_middle() -> None:
    angles = [i * math.pi / 20 for i in range(11)]
    circle = [(1 - math.cos(a), 1 - math.sin(a)) for a in angles]
    assert knee(circle) == 5


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3), table=rows)
def test_units_do_not_matter(scale: float, shift: float, table: list[tuple[float, ...]]) -> None:
    front = [table[n] for n in pareto_front(table)]
    assert knee([(scale * row[0] + shift, *row[1:]) for row in front]) == knee(front)


def test_of_two_extremes_the_first_counts() -> None:
    assert knee([(0.0, 1.0), (1.0, 0.0)]) == 0
    assert knee([(1.0, 0.0), (0.0, 1.0)]) == 0
    assert knee([(1.0, 2.0)]) == 0


@pytest.mark.parametrize("keep", range(7))
@pytest.mark.parametrize("num", [3, 5, 9])
def test_a_spread_keeps_the_ends_and_the_point_that_was_named(keep: int, num: int) -> None:
    places = [3.0, 0.0, 0.5, 10.0, 9.5, 5.0, 0.25]
    chosen = spread(places, keep, num)
    assert {keep, places.index(0.0), places.index(10.0)} <= set(chosen)
    assert len(chosen) == min(num, 7)
