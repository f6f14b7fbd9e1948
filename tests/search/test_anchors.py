"""Anchors: which, how they are named, and what the sampler may learn from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, Pairwise, Space, Window
from lightning_ckmerge.search.anchors import make_anchors
from tests.core.runs import coordinates, means, runs, with_latest

SPACES = [Decay(), Decay(ratio=None), Decay(max_extrapolation=0), Pairwise(), Window()]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda s: f"{type(s).__name__}-{vars(s)}")


@spaces
@given(data=st.data())
def test_anchors_are_distinct_and_named_and_begin_with_the_latest_weights(space: Space, data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    previous = data.draw(st.none() | coordinates(space, segments_K))
    anchors = make_anchors(segments_K, space, previous)
    assert anchors[0].name == "latest"
    assert anchors[0].coefficients_K == (0.0,) * (len(segments_K) - 1) + (1.0,)
    assert len({a.name for a in anchors}) == len({a.coefficients_K for a in anchors}) == len(anchors)
    for anchor in anchors:
        assert len(anchor.coefficients_K) == len(segments_K)
        assert math.fsum(anchor.coefficients_K) == pytest.approx(1, abs=1e-12)


@spaces
@given(data=st.data())
def test_an_anchors_coordinates_lie_in_the_space_and_give_its_coefficients(space: Space, data: st.DataObject) -> None:
    """Also for the optimum of an earlier search, of which the ranges were others."""
    segments_K = data.draw(runs())
    previous = data.draw(st.none() | coordinates(space, data.draw(runs())))
    ranges = space.coordinates(segments_K)
    for anchor in make_anchors(segments_K, space, previous):
        if anchor.coordinates is not None:
            assert anchor.coordinates.keys() == ranges.keys()
            assert all(ranges[n].low <= z <= ranges[n].high for n, z in anchor.coordinates.items())
            again = space.coefficients(anchor.coordinates, segments_K)
            assert again == pytest.approx(anchor.coefficients_K, abs=1e-9)


def test_a_long_window_has_all_the_known_candidates() -> None:
    anchors = make_anchors(with_latest(means([1000] * 9 + [500, 250, 250])), Decay())
    assert [a.name for a in anchors] == [
        "latest",
        *("uniform-2", "uniform-4", "uniform-8", "uniform-all"),
        *("ema-500", "ema-1200", "ema-3000"),
    ]
    by_name = {a.name: a for a in anchors}
    assert by_name["uniform-2"].coefficients_K[-3:] == (0.5, 0.5, 0.0)
    # Weighted by their steps: the mean over the last 2,000.
    assert by_name["uniform-4"].coefficients_K[-5:] == (0.5, 0.25, 0.125, 0.125, 0.0)
    assert {n for n, a in by_name.items() if a.coordinates} == {"ema-500", "ema-1200", "ema-3000"}


def test_a_uniform_mean_is_not_scored_twice_where_all_are_few() -> None:
    names = [a.name for a in make_anchors(with_latest(means([10, 10])), Window())]
    assert "uniform-2" not in names
    assert "uniform-all" in names


def test_an_anchor_takes_over_the_coordinates_of_its_twin() -> None:
    """So that the sampler knows both ends of the pair, and no candidate is scored twice."""
    anchors = make_anchors(with_latest(means([10] * 3), steps_since=10), Pairwise(alpha=0.25))
    assert [(a.name, a.coordinates) for a in anchors if a.coordinates] == [
        ("latest", {"lam": 1.0}),
        ("initial-0", {"lam": 0.25}),
    ]


@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        ({"tau": 120.0, "beta": 0.8}, {"tau": 120.0, "beta": 0.8}),
        ({"tau": 1e6, "beta": 3.0}, {"tau": 1800.0, "beta": 2.0}),
        ({"tau": 1.0, "beta": 0.8}, {"tau": 50.0, "beta": 0.8}),
        ({"lam": 0.5}, None),
        (None, None),
    ],
)
def test_the_last_optimum_is_moved_into_the_ranges(
    previous: dict[str, float] | None, expected: dict[str, float] | None
) -> None:
    segments_K: tuple[Segment, ...] = with_latest(means([100] * 9))
    found = {a.name: a.coordinates for a in make_anchors(segments_K, Decay(), previous)}
    assert found.get("previous") == expected
