"""The slope of a run: only where points tell it, and never more steps than they hold for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.search.verdict import Progress, current_slope

STEP = 900


def line(slope: float, num: int, noise: float = 0.0, seed: int = 0) -> list[tuple[int, float]]:
    """Return ``num`` points over the last third of ``STEP`` steps."""
    rng = random.Random(seed)
    steps = [STEP - 299 + round(i * 299 / (num - 1)) for i in range(num)]
    return [(s, 3.0 + slope * (s - STEP) + rng.gauss(0, noise)) for s in steps]


@given(slope=st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), num=st.integers(3, 40), seed=st.integers(0, 9))
def test_points_on_a_line_tell_its_slope(slope: float, num: int, seed: int) -> None:
    curve = line(slope, num)
    random.Random(seed).shuffle(curve)
    assert current_slope(curve, STEP) == pytest.approx(slope)


def test_only_the_last_third_counts_and_the_last_value_of_a_step() -> None:
    curve = [(s, 1000.0 - s) for s in range(1, 601, 100)] + [(750, 7.0)] + line(-0.001, 3)
    assert current_slope([*curve, (750, 3.15), (STEP + 1, 9.0)], STEP) == pytest.approx(-0.001, abs=1e-5)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_fewer_than_three_points_tell_nothing(num: int) -> None:
    assert current_slope(line(-0.001, 3)[:num], STEP) is None


@pytest.mark.parametrize("num", [3, 5, 20])
def test_where_a_run_stands_still_few_slopes_are_claimed(num: int) -> None:
    """Goes red with a normal instead of a t quantile: 8 % at three points."""
    claimed = [current_slope(line(0.0, num, noise=0.01, seed=seed), STEP) is not None for seed in range(400)]
    assert sum(claimed) / len(claimed) < 0.03


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_a_slope_that_is_told_is_right_by_a_factor_of_two(noise: float) -> None:
    slopes = [current_slope(line(-0.001, 12, noise=noise, seed=seed), STEP) for seed in range(400)]
    told = [s for s in slopes if s is not None]
    assert len(told) > 100
    assert sum(-0.002 < s < -0.0005 for s in told) / len(told) > 0.97


@pytest.mark.parametrize("sign", [1, -1])
def test_a_gain_is_worth_its_share_of_the_slope_to_two_digits(sign: int) -> None:
    falling = tuple((s, sign * v) for s, v in line(-0.0003, 10))
    progress = Progress(STEP, (falling,))
    assert progress.steps_worth(0.081, sign) == 270
    assert progress.steps_worth(0.00248, sign) == 8
    assert progress.steps_worth(0.081, -sign) is None  # it gets worse
    assert progress.steps_worth(0.0001, sign) is None  # less than a step
    assert progress.steps_worth(0.3, sign) is None  # no line holds for 1000 steps after 900


def test_without_a_slope_a_gain_is_worth_no_steps() -> None:
    for curve in ([], line(0.0, 5)):
        assert Progress(STEP, (curve,)).steps_worth(0.1, 1) is None
    assert Progress(STEP).steps_worth(0.1, 1) is None


def test_the_first_curve_that_tells_counts() -> None:
    progress = Progress(STEP, (line(-0.001, 3)[:2], line(-0.001, 4), line(-0.0001, 5)))
    assert progress.steps_worth(0.05, 1) == 50
