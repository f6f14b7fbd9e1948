"""The space in which a merge's hyperparameters are coordinates; what holds for every space is in test_spaces.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Auto, Decay, Grouped, kernel
from tests.support.segments import coordinates, means, runs, with_latest

NAMES = ["embed.weight", "blocks.0.attn.weight", "blocks.0.mlp.weight", "norm.weight"]
AUTO = Auto().bind(NAMES)
SEGMENTS = with_latest(means([400, 200, 100, 50, 50]))


def place(**choices: Any) -> dict[str, float]:
    """All five snapshots as they are, but for ``choices``."""
    return {"tau": 150.0, "beta": 0.5, "kernel": 0, "window": 5, "pool": 0, "groups": 0, **choices}


@given(data=st.data())
def test_each_kinds_coefficients_sum_to_one_at_every_point(data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    z_D = {**data.draw(coordinates(AUTO, segments_K)), "groups": 1}
    by_group = AUTO.by_group(z_D, segments_K)
    assert by_group.keys() == {"embeddings", "attention", "mlp", "norms"}
    for c_K in by_group.values():
        assert math.fsum(c_K) == pytest.approx(1, rel=0, abs=1e-12)
    assert AUTO.by_group({**z_D, "groups": 0}, segments_K) == {}


@given(segments_K=runs(), beta=st.floats(0, 2))
def test_all_snapshots_as_they_are_make_decay_and_grouped(segments_K: tuple[Segment, ...], beta: float) -> None:
    window = sum(1 for s in segments_K if s.num_steps)
    z_D = {**place(beta=beta, window=window), "tau": Decay().coordinates(segments_K)["tau"].low * 1.5}
    assert AUTO.coefficients(z_D, segments_K) == pytest.approx(Decay().coefficients(z_D, segments_K))
    power = AUTO.coefficients({**z_D, "kernel": 1}, segments_K)
    assert power == pytest.approx(Decay(kernel="power").coefficients(z_D, segments_K))
    by_group = AUTO.by_group({**z_D, "groups": 1}, segments_K)
    expected = Grouped().bind(NAMES).by_group(z_D, segments_K)
    assert all(by_group[group] == pytest.approx(c_K) for group, c_K in expected.items())


def test_a_window_is_a_shorter_buffer() -> None:
    inside = Decay().coefficients(place(), SEGMENTS[2:])
    assert AUTO.coefficients(place(window=3), SEGMENTS) == pytest.approx((0, 0, *inside))


def test_pools_are_longer_segments_counted_from_the_newest() -> None:
    oldest, middle, newest, latest = Decay().coefficients(place(), with_latest(means([400, 300, 100])))
    shared = (oldest, middle * 2 / 3, middle / 3, newest / 2, newest / 2, latest)
    assert AUTO.coefficients(place(pool=1), SEGMENTS) == pytest.approx(shared)
    # A window cuts before pools are made.
    oldest, newest, latest = Decay().coefficients(place(), with_latest(means([100, 100], start=600)))
    assert AUTO.coefficients(place(window=3, pool=1), SEGMENTS) == pytest.approx(
        (0, 0, oldest, newest / 2, newest / 2, latest)
    )


def test_choices_that_change_nothing_are_left_no_choice() -> None:
    ranges = Auto().bind(["net.weight"]).coordinates(with_latest(means([100])))
    fixed = {name: (ranges[name].low, ranges[name].high) for name in ("window", "pool", "groups")}
    assert fixed == {"window": (1, 1), "pool": (0, 0), "groups": (0, 0)}


def test_means_over_one_pool_and_emas_have_a_place() -> None:
    uniform_4 = (0, 0.5, 0.25, 0.125, 0.125, 0)
    z_D = AUTO.inverse(uniform_4, SEGMENTS)
    assert z_D is not None
    assert (z_D["window"], z_D["pool"]) == (4, 2)
    assert AUTO.inverse((0.5, 0.25, 0.125, 0.0625, 0.0625, 0), SEGMENTS) is None  # five are no pool
    assert AUTO.inverse((0, 0, 0, 0.4, 0.6, 0), SEGMENTS) is None  # not by steps
    assert AUTO.inverse((0, 0, 0, 0, 0, 1), SEGMENTS) is None  # the latest weights
    for name, code in (("exponential", 0), ("power", 1)):
        z_D = AUTO.place_of_kernel(name, 150.0, SEGMENTS)
        assert z_D == place(beta=0.0, kernel=code)
        assert AUTO.coefficients(z_D, SEGMENTS) == pytest.approx(kernel(name, SEGMENTS, 150.0))
    assert AUTO.place_of_kernel("minus_sqrt", 150.0, SEGMENTS) is None


def test_a_long_average_asks_for_a_larger_buffer_only_where_it_has_all_of_it() -> None:
    longest = AUTO.coordinates(SEGMENTS)["tau"].high
    assert "buffer.capacity" in AUTO.warnings(place(tau=longest), SEGMENTS)[0]
    assert AUTO.warnings(place(tau=longest, window=4), SEGMENTS) == []
    assert "beta" in AUTO.warnings(place(beta=2.0, window=4), SEGMENTS)[0]
