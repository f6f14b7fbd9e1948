from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.core.coefficient_schedules import parse_schedule
from lightning_ckmerge.errors import ConfigError

TEXTS = st.sampled_from(["uniform", "linear", "minus-sqrt", "ema:0.5", "ema:40", "power:0", "power:-0.5", "power:6"])


@given(text=TEXTS, num=st.integers(1, 60))
def test_coefficients_sum_to_one_and_none_is_negative(text: str, num: int) -> None:
    c_K = parse_schedule(text).coefficients(num)
    assert len(c_K) == num
    assert math.isclose(math.fsum(c_K), 1, abs_tol=1e-12)
    assert min(c_K) >= 0


@pytest.mark.parametrize("text", ["linear", "power:0", "ema:1e12"])
def test_what_is_the_uniform_mean(text: str) -> None:
    assert parse_schedule(text).coefficients(5) == pytest.approx((0.2,) * 5)


def test_a_decay_is_the_sum_of_what_comes_after() -> None:
    """WSM: the steps between two checkpoints count as a learning rate of ``1 - sqrt(x)`` would count them."""
    c_K = parse_schedule("minus-sqrt").coefficients(10)
    remaining = [math.fsum(c_K[k:]) for k in range(10)]
    assert remaining == pytest.approx([1 - math.sqrt(k / 10) for k in range(10)])


def test_an_ema_forgets_by_checkpoints() -> None:
    c_K = parse_schedule("ema:2").coefficients(6)
    assert [b / a for a, b in itertools.pairwise(c_K)] == pytest.approx([math.exp(0.5)] * 5)


def test_a_power_average_weighs_by_time() -> None:
    assert parse_schedule("power:2").coefficients(2) == pytest.approx((1 / 8, 7 / 8))


def test_slerp_takes_two() -> None:
    assert parse_schedule("slerp:0.3").coefficients(2) == pytest.approx((0.7, 0.3))
    with pytest.raises(ConfigError, match="got 3"):
        parse_schedule("slerp:0.3").coefficients(3)


@pytest.mark.parametrize("text", ["", "cosine", "ema", "ema:", "ema:0", "ema:x", "ema:nan", "uniform:2", "power:-1"])
def test_what_is_no_schedule_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(ConfigError, match="uniform, ema:TAU, linear, minus-sqrt, power:P or slerp:T"):
        parse_schedule(text)
