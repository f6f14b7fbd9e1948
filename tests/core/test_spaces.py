"""Spaces: what holds for every point of each, and the shapes that they promise.

Letters: K snapshots, oldest first; T steps.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import (
    Affine,
    Auto,
    Decay,
    Grouped,
    KernelName,
    Pairwise,
    Simplex,
    Space,
    SpaceName,
    Tail,
    Window,
    exponential_kernel,
    kernel,
    make_space,
    near,
    normalised,
    power_kernel,
)
from lightning_ckmerge.errors import ConfigError
from tests.support.segments import coordinates, means, runs, with_latest

NAMES = ["embed.weight", "blocks.0.attn.weight", "blocks.0.mlp.weight", "norm.weight"]
SPACES = [
    Decay(),
    Decay(ratio=None, max_extrapolation=4.0),
    Decay(max_extrapolation=0),
    Decay(kernel="power"),
    Decay(kernel="minus_sqrt"),
    Pairwise(),
    Window(),
    Simplex(),
    Affine(),
    Grouped().bind(NAMES),
    Grouped(factors={}, max_deviation=0.2).bind(NAMES),
    Grouped(space=Simplex(), along="w0", max_deviation=0.5).bind(NAMES),
    Auto(),
    Auto().bind(NAMES),
    Tail(),
]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda s: type(s).__name__)
kernels = pytest.mark.parametrize("name", get_args(KernelName))
taus = st.floats(1e-3, 1e12)


@spaces
@given(data=st.data())
def test_coefficients_sum_to_one_at_every_point(space: Space, data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    c_K = space.coefficients(data.draw(coordinates(space, segments_K)), segments_K)
    assert len(c_K) == len(segments_K)
    assert math.fsum(c_K) == pytest.approx(1, rel=0, abs=1e-12)


@spaces
@given(segments_K=runs())
@example(segments_K=with_latest(means([1])))
@example(segments_K=with_latest(means([10**12])))
def test_ranges_are_valid_for_any_segments(space: Space, segments_K: tuple[Segment, ...]) -> None:
    for interval in space.coordinates(segments_K).values():
        assert -math.inf < interval.low <= interval.high < math.inf
        assert interval.low > 0 or not interval.log
        assert not interval.integer or {interval.low % 1, interval.high % 1} == {0}


@given(segments_K=runs(max_length=50), tau=st.floats(1e-3, 1e6), seed=st.integers(0, 99))
def test_decay_is_the_ema_of_every_step_that_the_segments_average(
    segments_K: tuple[Segment, ...], tau: float, seed: int
) -> None:
    """A pooled segment counts as each of its steps having its mean; segments of one step are the steps themselves."""
    counted_K = [s for s in segments_K if s.num_steps]
    means_K = [random.Random(seed + i).gauss(0, 1) for i in range(len(counted_K))]
    decay, ema, correction = math.exp(-1 / tau), 0.0, 0.0
    for mean, segment in zip(means_K, counted_K, strict=True):
        for _ in range(segment.num_steps):
            ema, correction = decay * ema + (1 - decay) * mean, decay * correction + (1 - decay)
    c_K = Decay().coefficients({"tau": tau, "beta": 0.0}, segments_K)
    merged = math.fsum(c * m for c, m in zip(c_K, means_K, strict=False))
    # Corrected for its start, as in Adam.
    assert merged == pytest.approx(ema / correction, rel=1e-6, abs=1e-6)


@given(segments_K=runs())
def test_a_long_decay_is_the_uniform_mean_over_steps(segments_K: tuple[Segment, ...]) -> None:
    total = sum(s.num_steps for s in segments_K)
    uniform_K = [s.num_steps / total for s in segments_K]
    assert exponential_kernel(segments_K, math.inf) == pytest.approx(uniform_K)
    assert exponential_kernel(segments_K, 1e9 * total) == pytest.approx(uniform_K, rel=1e-6, abs=1e-12)


@given(segments_K=runs())
def test_a_short_decay_is_the_newest_counted_snapshot(segments_K: tuple[Segment, ...]) -> None:
    newest = max(i for i, s in enumerate(segments_K) if s.num_steps)
    assert exponential_kernel(segments_K, 1e-3)[newest] == pytest.approx(1)


@kernels
@given(parts=st.lists(st.integers(1, 1000), min_size=2, max_size=8), older=st.integers(1, 1000), tau=taus)
def test_a_pooled_segment_weighs_as_much_as_its_parts(
    name: KernelName, parts: list[int], older: int, tau: float
) -> None:
    apart = kernel(name, with_latest(means([older, *parts, 3])), tau)
    pooled = kernel(name, with_latest(means([older, sum(parts), 3])), tau)
    assert pooled[1] == pytest.approx(sum(apart[1:-2]), rel=1e-9, abs=1e-12)
    assert pooled[2] == pytest.approx(apart[-2], rel=1e-9)


@kernels
@given(segments_K=runs(), tau=taus)
def test_a_kernel_never_leaves_the_simplex(name: KernelName, segments_K: tuple[Segment, ...], tau: float) -> None:
    c_K = kernel(name, segments_K, tau)
    assert min(c_K) >= 0
    assert not any(c for c, s in zip(c_K, segments_K, strict=True) if not s.num_steps)


@kernels
def test_tau_is_the_mean_age_in_a_long_run(name: KernelName) -> None:
    """So the coordinate means the same, whichever the kernel."""
    segments_K = with_latest(means([1] * 20_000))
    ages_K = [20_000 - s.last_step + 0.5 for s in segments_K]
    mean_age = math.fsum(c * a for c, a in zip(kernel(name, segments_K, 300.0), ages_K, strict=True))
    assert mean_age == pytest.approx(300, rel=0.05)


@given(gamma=st.floats(0.1, 20), lengths=st.lists(st.integers(1, 100), min_size=2, max_size=6))
def test_the_power_kernel_is_the_post_hoc_emas(gamma: float, lengths: list[int]) -> None:
    """Their profile: proportional to ``step ** gamma`` from the run's first step on."""
    num_steps = sum(lengths)
    c_K = power_kernel(with_latest(means(lengths)), num_steps / gamma)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    profile = [(e / num_steps) ** (gamma + 1) - (b / num_steps) ** (gamma + 1) for b, e in pairwise(ends)]
    assert c_K[:-1] == pytest.approx(profile, abs=1e-12)


def test_minus_sqrt_weighs_what_the_falling_rate_loses() -> None:
    """Over a window of 1.5 tau = 90 steps: the differences of sqrt at its thirds, and nothing before it."""
    c_K = kernel("minus_sqrt", with_latest(means([100, 30, 30, 30])), 60.0)
    assert c_K == pytest.approx((0, (1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5, 0))


@pytest.mark.parametrize("space", [Simplex(), Affine(), Auto()], ids=["simplex", "affine", "auto"])
@given(data=st.data())
def test_coefficients_are_those_of_their_own_inverse(space: Space, data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    c_K = normalised(
        data.draw(st.lists(st.floats(0, 1), min_size=len(segments_K), max_size=len(segments_K)).filter(any))
    )
    z_D = space.inverse(c_K, segments_K)
    if isinstance(space, Simplex):
        assert z_D is not None
    if z_D is not None:
        assert space.coefficients(z_D, segments_K) == pytest.approx(c_K, abs=1e-12)
        ranges = space.coordinates(segments_K)
        assert all(ranges[n].low <= z <= ranges[n].high for n, z in z_D.items())


def test_the_simplex_reaches_its_corners_and_affine_combinations_leave_it() -> None:
    segments_K = with_latest(means([100, 50, 25]))
    corner = (0.0, 0.0, 1.0, 0.0)
    assert Simplex().inverse(corner, segments_K) == {"w0": 0, "w1": 0, "w2": 1, "w3": 0}
    outside = (-0.2, 0.2, 0.7, 0.3)
    assert Simplex().inverse(outside, segments_K) is None
    assert Affine(max_deviation=0.8).inverse(outside, segments_K) is not None
    assert Affine(max_deviation=0.1).inverse(outside, segments_K) is None


@given(segments_K=runs(), tau=taus, beta=st.floats(0, 4), share=st.floats(0, 1))
def test_extrapolation_steps_from_the_long_mean_past_the_short_one_towards_the_latest_weights(
    segments_K: tuple[Segment, ...], tau: float, beta: float, share: float
) -> None:
    c_K = Decay(latest_share=share).coefficients({"tau": tau, "beta": beta}, segments_K)
    short_K, long_K = exponential_kernel(segments_K, tau), exponential_kernel(segments_K, 4 * tau)
    latest_K = [*[0.0] * (len(segments_K) - 1), 1.0]
    head_K = [(1 - share) * s + share * l for s, l in zip(short_K, latest_K, strict=True)]
    expected = [s + beta * (h - l) for s, h, l in zip(short_K, head_K, long_K, strict=True)]
    assert c_K == pytest.approx(expected, rel=1e-9, abs=1e-12)
    freed = Decay(ratio=None, latest_share=share).coefficients({"tau": tau, "beta": beta, "ratio": 4.0}, segments_K)
    assert freed == c_K


def test_the_coordinates_of_decay() -> None:
    segments_K = with_latest(means([400, 200, 100]))
    assert Decay().coordinates(segments_K).keys() == {"tau", "beta"}
    assert Decay(ratio=None).coordinates(segments_K).keys() == {"tau", "beta", "ratio"}
    assert Decay(max_extrapolation=0, ratio=None).coordinates(segments_K).keys() == {"tau"}
    tau = Decay().coordinates(segments_K)["tau"]
    assert (tau.low, tau.high, tau.log) == (50, 1400, True)


@given(segments_K=runs(), alpha=st.floats(0, 0.99))
def test_the_pairs_end_points_come_first_and_are_the_two_newest(segments_K: tuple[Segment, ...], alpha: float) -> None:
    space = Pairwise(alpha=alpha)
    low, high = (space.coefficients(z_D, segments_K) for z_D in space.initial(segments_K))
    assert low[-2:] == (1 - alpha, alpha)
    assert high[-2:] == (0, 1)
    assert not any(low[:-2] + high[:-2])
    interval = space.coordinates(segments_K)["lam"]
    assert (interval.low, interval.high) == (alpha, 1)


@given(segments_K=runs(max_length=1000), k=st.integers(1, 17))
def test_a_window_without_tilt_is_the_mean_over_its_steps(segments_K: tuple[Segment, ...], k: int) -> None:
    window = [s for s in segments_K if s.num_steps][-k:]
    total = sum(s.num_steps for s in window)
    expected = [s.num_steps / total if s in window else 0 for s in segments_K]
    assert Window().coefficients({"k": k, "tilt": 0.0}, segments_K) == pytest.approx(expected)


@given(tilt=st.floats(0.01, 3))
def test_tilt_leans_towards_new_snapshots(tilt: float) -> None:
    segments_K = with_latest(means([10] * 4))
    c_K = Window().coefficients({"k": 4, "tilt": tilt}, segments_K)[:-1]
    assert list(c_K) == sorted(c_K)
    assert c_K[-1] / c_K[0] == pytest.approx(math.exp(2 * tilt))
    assert Window().coefficients({"k": 4, "tilt": -tilt}, segments_K)[:-1] == pytest.approx(c_K[::-1])


def test_an_optimum_on_a_bound_is_reported() -> None:
    segments_K = with_latest(means([100] * 9))
    tau = Decay().coordinates(segments_K)["tau"]
    inside = {"tau": 100.0, "beta": 1.0}
    assert Decay().warnings(inside, segments_K) == []
    assert "buffer.capacity" in Decay().warnings({**inside, "tau": tau.high}, segments_K)[0]
    assert "beta" in Decay().warnings({**inside, "beta": 2.0}, segments_K)[0]
    # No extrapolation and the shortest of means are answers, not limits.
    assert Decay().warnings({"tau": tau.low, "beta": 0.0}, segments_K) == []
    assert Pairwise().warnings({"lam": 0.5}, segments_K) == []
    assert "latest weights" in Pairwise().warnings({"lam": 1.0}, segments_K)[0]
    assert "0.87" in Pairwise(alpha=0.87).warnings({"lam": 0.87}, segments_K)[0]
    assert Window().warnings({"k": 9, "tilt": 3.0}, segments_K) == []


def test_nearness_is_measured_on_the_intervals_own_scale() -> None:
    tau = Decay().coordinates(with_latest(means([10, 5000])))["tau"]
    assert near(0.99 * tau.high, tau.high, tau)
    assert near(1.01 * tau.low, tau.low, tau)
    assert not near(0.98 * tau.high, tau.high, tau)
    lam = Pairwise().coordinates(with_latest(means([10])))["lam"]
    assert near(0.995, 1.0, lam)
    assert not near(0.98, 1.0, lam)


def test_a_space_has_a_name_or_is_an_object() -> None:
    assert {name: type(make_space(name)) for name in get_args(SpaceName)} == {
        "decay": Decay,
        "pairwise": Pairwise,
        "window": Window,
        "simplex": Simplex,
        "affine": Affine,
        "grouped": Grouped,
        "auto": Auto,
        "tail": Tail,
    }
    space = Decay(ratio=2.0)
    assert make_space(space) is space


@given(data=st.data())
def test_a_tail_is_a_short_decay_that_begins_inside_its_ranges(data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    (start,) = Tail().initial(segments_K)
    for z_D in (start, data.draw(coordinates(Tail(), segments_K))):
        assert Tail().coefficients(z_D, segments_K) == Decay().coefficients(z_D, segments_K)
        # Much shorter than the window, unless that has hardly more than one segment.
        newest = next(s.num_steps for s in reversed(segments_K) if s.num_steps)
        assert z_D["tau"] <= max(0.15 * sum(s.num_steps for s in segments_K), newest, 2.0)
        for name, interval in Tail().coordinates(segments_K).items():
            assert interval.low <= z_D[name] <= interval.high


@pytest.mark.parametrize(
    ("make", "rule", "value"),
    [
        (lambda: Decay(ratio=1.0), "`ratio > 1`", "1.0"),
        (lambda: Decay(max_extrapolation=-0.5), "`max_extrapolation >= 0`", "-0.5"),
        (lambda: Pairwise(alpha=1.0), "`0 <= alpha < 1`", "1.0"),
        (lambda: Pairwise(alpha=-0.1), "`0 <= alpha < 1`", "-0.1"),
        (lambda: Window(max_tilt=0.0), "`max_tilt > 0`", "0.0"),
        (lambda: Decay(latest_share=1.5), "`0 <= latest_share <= 1`", "1.5"),
        (lambda: Decay(kernel="gauss"), "`kernel` must be one of", "'gauss'"),
        (lambda: Affine(max_deviation=0.0), "`max_deviation > 0`", "0.0"),
    ],
)
def test_a_space_out_of_range_is_refused(make: type[Space], rule: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{rule}.* got {value}\. \S"):
        make()


grouped = pytest.mark.parametrize(
    "space", [s for s in SPACES if isinstance(s, Grouped)], ids=lambda s: type(s).__name__
)


@grouped
@given(data=st.data())
def test_each_groups_coefficients_sum_to_one_at_every_point(space: Grouped, data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    by_group = space.by_group(data.draw(coordinates(space, segments_K)), segments_K)
    assert by_group.keys() == {"embeddings", "attention", "mlp", "norms"}
    for c_K in by_group.values():
        assert math.fsum(c_K) == pytest.approx(1, rel=0, abs=1e-12)


@given(data=st.data())
def test_without_factors_and_deviations_groups_have_the_inner_spaces_coefficients(data: st.DataObject) -> None:
    segments_K = data.draw(runs())
    space = Grouped(factors={}, max_deviation=0.2).bind(NAMES)
    z_D = data.draw(coordinates(Decay(), segments_K))
    c_K = Decay().coefficients(z_D, segments_K)
    at_zero = {name: z_D.get(name, 0.0) for name in space.coordinates(segments_K)}
    assert all(group_K == pytest.approx(c_K) for group_K in space.by_group(at_zero, segments_K).values())
    tau = z_D["tau"]
    placed = space.place_of_kernel("exponential", tau, segments_K)
    assert placed == {**dict.fromkeys(at_zero, 0.0), "tau": tau}


def test_a_factor_moves_its_group_alone() -> None:
    segments_K = with_latest(means([40, 20, 10, 10]))
    by_group = Grouped(factors={"mlp": 0.5}).bind(NAMES).by_group({"tau": 30.0, "beta": 0.5}, segments_K)
    assert by_group["norms"] == Decay().coefficients({"tau": 30.0, "beta": 0.5}, segments_K)
    assert by_group["mlp"] == Decay().coefficients({"tau": 15.0, "beta": 0.5}, segments_K)


@pytest.mark.parametrize(
    ("space", "names"),
    [
        (Grouped(), ["conv.weight", "bn1.weight"]),
        (Grouped(), ["h.0.attn.weight", "h.1.attn.weight"]),
        (Grouped(factors={}), NAMES),
        (Grouped(max_deviation=0.2), ["mlp.weight"]),
    ],
)
def test_where_nothing_sets_groups_apart_the_inner_space_is_searched(space: Grouped, names: list[str]) -> None:
    """So that the sampler knows the EMA anchors, and nobody reads of groups that are all alike."""
    segments_K = with_latest(means([40, 20, 10, 10]))
    bound = space.bind(NAMES).bind(names)
    assert bound.group_of == bound.by_group({"tau": 30.0, "beta": 0.5}, segments_K) == {}
    assert bound.coordinates(segments_K) == Decay().coordinates(segments_K)
    assert bound.place_of_kernel("exponential", 30.0, segments_K) == {"tau": 30.0, "beta": 0.0}


def test_the_coordinate_that_differs_must_be_the_inner_spaces() -> None:
    with pytest.raises(ConfigError, match=r"got 'lam'.*tau, beta"):
        Grouped(along="lam", max_deviation=0.1).bind(NAMES).coordinates(with_latest(means([4, 4])))
