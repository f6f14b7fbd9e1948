"""Anchors: which, how they are named, and what the sampler may learn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.config import AnchorName
from lightning_ckmerge.core.coefficient_schedules import Schedule
from lightning_ckmerge.core.outcome import Candidate, Score, Scored
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Auto, Decay, Pairwise, Simplex, Space, Tail, Window
from lightning_ckmerge.search.anchors import make_anchors, most_anchors, next_anchor
from tests.support.segments import coordinates, means, runs, with_latest

SPACES = [
    Decay(),
    Decay(ratio=None),
    Decay(max_extrapolation=0, kernel="minus_sqrt"),
    Pairwise(),
    Window(),
    Simplex(),
    Auto(),
    Tail(),
]
NAMES: tuple[AnchorName, ...] = get_args(AnchorName)
names_of_anchors = st.permutations(NAMES).flatmap(lambda all: st.integers(0, len(all)).map(lambda n: all[:n]))
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda s: type(s).__name__)


@spaces
@given(data=st.data())
def test_anchors_are_distinct_and_named_and_begin_with_the_latest_weights(space: Space, data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    previous = data.draw(st.none() | coordinates(space, segments_K))
    anchors = make_anchors(segments_K, space, previous, data.draw(names_of_anchors))
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
    for anchor in make_anchors(segments_K, space, previous, NAMES):
        if anchor.coordinates is not None:
            assert anchor.coordinates.keys() == ranges.keys()
            assert all(ranges[n].low <= z <= ranges[n].high for n, z in anchor.coordinates.items())
            again = space.coefficients(anchor.coordinates, segments_K)
            assert again == pytest.approx(anchor.coefficients_K, abs=1e-9)


def test_a_long_window_has_all_the_known_candidates() -> None:
    anchors = make_anchors(with_latest(means([1000] * 9 + [500, 250, 250])), Decay())
    assert [a.name for a in anchors] == [
        *("latest", "initial-0"),
        *("ema-500", "ema-1200", "ema-3000"),
        *("uniform-2", "uniform-4", "uniform-8", "uniform-all"),
    ]
    by_name = {a.name: a for a in anchors}
    assert by_name["uniform-2"].coefficients_K[-3:] == (0.5, 0.5, 0.0)
    # Weighted by their steps: the mean over the last 2,000.
    assert by_name["uniform-4"].coefficients_K[-5:] == (0.5, 0.25, 0.125, 0.125, 0.0)
    assert {n for n, a in by_name.items() if a.coordinates} == {"initial-0", "ema-500", "ema-1200", "ema-3000"}
    assert by_name["initial-0"].coordinates == {"tau": 1000.0, "beta": 0.6}


def test_what_is_likely_to_be_the_best_comes_first() -> None:
    """The better the incumbent, the sooner others are dropped."""
    previous = {"tau": 120.0, "beta": 0.8}
    anchors = make_anchors(with_latest(means([100] * 9)), Decay(), previous)
    assert [a.name for a in anchors[:4]] == ["latest", "previous", "initial-0", "ema-45"]


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


def score_all(
    segments_K: Sequence[Segment],
    names: Sequence[AnchorName],
    value: Callable[[Sequence[float]], float],
    sign: int = 1,
    space: Space | None = None,
) -> list[Scored]:
    """Score the anchors as a search does, each once."""
    space = space or Window()

    def scored(candidate: Candidate) -> Scored:
        return Scored(candidate=candidate, search=Score(value=value(candidate.coefficients_K)))

    trials = [scored(c) for c in make_anchors(segments_K, space, names=names)]
    while (anchor := next_anchor(segments_K, space, names, trials, sign)) is not None:
        trials.append(scored(anchor))
    return trials


def distance(c_K: Sequence[float]) -> float:
    """A loss whose optimum mixes the snapshots, the newer ones more, the second newest least."""
    w_K = [0.0 if i == len(c_K) - 2 else (i + 1) ** 1.3 for i in range(len(c_K))]
    return 0.1 + sum((c - w / sum(w_K)) ** 2 for c, w in zip(c_K, w_K, strict=True))


@given(segments_K=runs(max_segments=10), names=names_of_anchors, sign=st.sampled_from([1, -1]), seed=st.integers())
def test_each_is_scored_once_and_all_are_expected(
    segments_K: Sequence[Segment], names: Sequence[AnchorName], sign: int, seed: int
) -> None:
    """Whatever the values: the plan states how many there are at most."""
    trials = score_all(segments_K, names, lambda c_K: hash((seed, tuple(c_K))) % 1000 - 500.0, sign)
    keys = [tuple(round(c, 12) for c in t.candidate.coefficients_K) for t in trials]
    assert len(set(keys)) == len(keys) == len({t.candidate.name for t in trials})
    assert all(math.fsum(t.candidate.coefficients_K) == pytest.approx(1, abs=1e-9) for t in trials)
    assert len(trials) <= most_anchors(names, len(segments_K) - 1)


def test_published_schedules_are_those_that_merge_checkpoints() -> None:
    """The latest weights are covered by the newest mean."""
    by_name = {a.name: a for a in make_anchors(with_latest(means([50] * 5)), Decay(), names=NAMES[2:4])}
    for name in ("linear", "minus-sqrt"):
        expected = (*Schedule(name=name).coefficients(5), 0.0)
        assert by_name[f"wsm-{name}"].coefficients_K == pytest.approx(expected)


def test_each_snapshot_alone() -> None:
    anchors = make_anchors(with_latest(means([50, 25, 25]), steps_since=5), Window(), names=["best-single"])
    assert [a.name for a in anchors] == ["latest", "single-50", "single-75", "single-100"]
    assert [a.coefficients_K.index(1.0) for a in anchors] == [3, 0, 1, 2]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_greedy_soup_is_that_of_its_authors(sign: int) -> None:
    """Written down once more, with sets instead of a replay."""
    segments_K = with_latest(means([10] * 6))
    trials = score_all(segments_K, ["greedy-soup"], lambda c_K: sign * distance(c_K), sign)

    def loss(soup: set[int]) -> float:
        return distance([(k in soup) / len(soup) for k in range(7)])

    ranked = sorted(range(7), key=lambda k: loss({k}))
    soup = {ranked[0]}
    for k in ranked[1:]:
        if loss(soup | {k}) <= loss(soup):
            soup |= {k}
    best = min(trials, key=lambda t: sign * t.search.value).candidate
    assert best.coefficients_K == pytest.approx([(k in soup) / len(soup) for k in range(7)])
    assert 2 < len(soup) < 7
    assert len([t for t in trials if t.candidate.name.startswith("greedy-soup")]) == 6


def test_a_soup_takes_over_what_another_anchor_has_found() -> None:
    """Its first try, the mean over the two older snapshots, is a uniform mean, which is scored already."""
    segments_K = with_latest(means([10, 10]))
    trials = score_all(segments_K, ["uniform", "greedy-soup"], lambda c_K: 0.2 * c_K[0] + 0.1 * c_K[1] + c_K[2])
    assert [t.candidate.name for t in trials] == ["latest", "uniform-all", "single-10", "single-20", "greedy-soup-1"]
    assert trials[1].candidate.coefficients_K == (0.5, 0.5, 0.0)
    assert trials[-1].candidate.coefficients_K == (0.0, 0.5, 0.5)


def weighted(values_K: Sequence[float], sign: int) -> dict[str, tuple[float, ...]]:
    """Return the coefficients of metrics-weighted anchors, where snapshots alone have these values."""
    segments_K = with_latest(means([10] * (len(values_K) - 1)))
    trials = score_all(segments_K, ["metrics-weighted"], lambda c_K: values_K[list(c_K).index(max(c_K))], sign)
    prefix = "metrics-weighted-"
    found = {t.candidate.name: t.candidate.coefficients_K for t in trials}
    return {name.removeprefix(prefix): c_K for name, c_K in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("values_K", "sign"),
    [([2.0, 1.0, 4.0], 1), ([0.2, 0.4, 0.1], -1), ([-2.0, -4.0, -1.0], 1), ([-2.0, -1.0, -4.0], -1)],
)
def test_snapshots_weigh_as_their_metric_says(values_K: Sequence[float], sign: int) -> None:
    found = weighted(values_K, sign)
    assert found["1"] == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    assert found["10"] == pytest.approx([2**-10, 1, 4**-10], rel=1e-2)
    # A power of 100 leaves the best one, which is scored already.
    assert found.keys() == {"1", "10"}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_snapshot_without_a_value_weighs_nothing(sign: int) -> None:
    assert weighted([math.nan, 1.0, 1.0], sign)["1"] == pytest.approx([0, 0.5, 0.5])
    assert weighted([-1.0, 0.0, 1.0], sign) == {}


def test_the_sampler_learns_from_a_soup_that_lies_in_its_space() -> None:
    trials = score_all(with_latest(means([10] * 3)), ["greedy-soup"], distance, space=Simplex())
    assert all(t.candidate.coordinates is not None for t in trials)
