"""Dropping losers: never a winner's twin, seldom a winner, and in one unit with complete scores."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.racing import MIN_BATCHES, Race, paired_difference

values = st.floats(-1e3, 1e3)
batches = st.lists(st.tuples(values, values, st.floats(0.5, 64)), min_size=2, max_size=30)


def score(values_B: list[float], sizes_B: list[float] | None = None) -> Score:
    sizes = sizes_B or [1.0] * len(values_B)
    mean = sum(v * w for v, w in zip(values_B, sizes, strict=True)) / sum(sizes)
    return Score(value=mean, values_B=tuple(values_B), sizes_B=tuple(sizes), num_batches=len(values_B))


def batches_until_dropped(race: Race, values_B: list[float]) -> int:
    """Return how many batches a candidate is scored on."""
    return next((n for n in range(1, len(values_B)) if not race.keep_going(values_B[:n], [1.0] * n)), len(values_B))


@given(batches=batches)
def test_the_paired_difference_is_weighted_and_antisymmetric(batches: list[tuple[float, float, float]]) -> None:
    ours_B, theirs_B, sizes_B = map(list, zip(*batches, strict=True))
    mean, error = paired_difference(ours_B, theirs_B, sizes_B)
    swapped, same_error = paired_difference(theirs_B, ours_B, sizes_B)
    assert mean == pytest.approx(score(ours_B, sizes_B).value - score(theirs_B, sizes_B).value, abs=1e-9)
    assert (swapped, same_error) == (pytest.approx(-mean), pytest.approx(error))
    scaled = paired_difference(ours_B, theirs_B, [7 * w for w in sizes_B])
    assert scaled == (pytest.approx(mean, abs=1e-9), pytest.approx(error, abs=1e-9))


def test_with_equal_sizes_it_is_the_textbook_standard_error() -> None:
    assert paired_difference([1.0, 2.0, 3.0, 6.0], [0.0] * 4, [5.0] * 4) == pytest.approx((3.0, (14 / 3) ** 0.5 / 2))


def test_one_batch_says_nothing_about_the_error() -> None:
    assert paired_difference([3.0], [1.0], [8.0]) == (2.0, float("inf"))


@given(values_B=st.lists(values, min_size=1, max_size=30), sign=st.sampled_from([1, -1]))
def test_an_equal_or_better_candidate_is_never_dropped(values_B: list[float], sign: int) -> None:
    race = Race(score(values_B), sign)
    assert batches_until_dropped(race, values_B) == len(values_B)
    assert batches_until_dropped(race, [v - sign for v in values_B]) == len(values_B)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clear_loser_is_dropped_after_the_fewest_batches(sign: int) -> None:
    incumbent_B = [random.Random(i).gauss(0, 10) for i in range(20)]
    race = Race(score(incumbent_B), sign)
    assert batches_until_dropped(race, [v + 0.5 * sign for v in incumbent_B]) == MIN_BATCHES


@given(values_B=st.lists(values, min_size=5, max_size=30), sign=st.sampled_from([1, -1]))
def test_where_a_margin_is_asked_for_what_falls_short_of_it_is_dropped(values_B: list[float], sign: int) -> None:
    race = Race(score(values_B), sign, margin=1.0)
    assert batches_until_dropped(race, values_B) == MIN_BATCHES
    assert batches_until_dropped(race, [v - 0.5 * sign for v in values_B]) == MIN_BATCHES
    assert batches_until_dropped(race, [v - 1.5 * sign for v in values_B]) == len(values_B)


def test_a_noisy_loser_is_given_the_benefit_of_the_doubt() -> None:
    incumbent_B = [0.0] * 20
    candidate_B = [0.5 if i % 2 else -0.4 for i in range(20)]
    assert batches_until_dropped(Race(score(incumbent_B), 1), candidate_B) == 20


def test_an_estimate_is_the_incumbents_value_and_the_difference() -> None:
    """Four easy batches must not make a loser look like a winner."""
    incumbent = score([0.0] * 4 + [10.0] * 16)
    partial = score([1.0] * 4)
    estimate = Race(incumbent, 1).estimate(partial)
    assert estimate.value == incumbent.value + 1
    assert not estimate.complete
    assert estimate.values_B == partial.values_B


@given(
    values_B=st.lists(st.floats(-1e300, 1e300) | st.sampled_from([math.inf, -math.inf, math.nan]), min_size=1),
    sign=st.sampled_from([1, -1]),
)
def test_any_number_may_come_from_a_candidate(values_B: list[float], sign: int) -> None:
    """A merge that overflows gives infinities, even of both signs: it is dropped, and the search goes on."""
    incumbent = score([0.0] * (len(values_B) + 1))
    num_batches = batches_until_dropped(Race(incumbent, sign), [*values_B, 0.0])
    assert all(map(math.isfinite, values_B[: num_batches - 1]))
    estimate = Race(incumbent, sign).estimate(score(values_B[:num_batches]))
    assert math.isfinite(estimate.value) == math.isfinite(values_B[:num_batches][-1])
