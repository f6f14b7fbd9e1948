"""Brent's sampler: few trials on smooth valleys, sure on all others, and nothing kept but the study."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.core.spaces import Decay, Pairwise
from lightning_ckmerge.errors import ConfigError, SearchError
from lightning_ckmerge.search.brent import BrentSampler, next_point
from tests.search.paraboloid import POINTS, SEGMENTS, HaltError, Paraboloid, halting, make_search, proposals

TOLERANCE = 1e-3
VALLEYS: dict[str, Callable[[float, float], float]] = {
    "parabola": lambda x, at: (x - at) ** 2,
    "kink": lambda x, at: abs(x - at),
    "flat": lambda x, at: (x - at) ** 4,
    "steep on one side": lambda x, at: math.exp(4 * (x - at)) - 4 * (x - at),
}


def minimise(f: Callable[[float], float], num: int, known: tuple[float, ...] = ()) -> list[float]:
    """Return the points at which ``f`` was asked for."""
    x_N = list(known)
    y_N = list(map(f, x_N))
    for _ in range(num):
        x_N.append(next_point(x_N, y_N, 0.0, 1.0, TOLERANCE))
        y_N.append(f(x_N[-1]))
    return x_N


@pytest.mark.parametrize("valley", VALLEYS.values(), ids=VALLEYS.keys())
@given(at=st.floats(0, 1), known=st.lists(st.floats(0, 1), max_size=3))
def test_it_finds_the_bottom_of_any_valley(
    valley: Callable[[float, float], float], at: float, known: list[float]
) -> None:
    """Each point lies in the range, and no two are the same."""
    x_N = minimise(lambda x: valley(x, at), 24, tuple(known))
    best = min(x_N, key=lambda x: valley(x, at))
    assert all(0 <= x <= 1 for x in x_N)
    assert best == pytest.approx(at, abs=0.02)
    asked = sorted(x_N[len(known) :])
    assert all(b - a >= TOLERANCE / 2 - 1e-12 for a, b in itertools.pairwise(asked))


@given(at=st.floats(0.05, 0.95))
def test_a_parabola_takes_two_trials_after_its_end_points(at: float) -> None:
    """Golden section alone would need ten."""
    asked = minimise(lambda x: (x - at) ** 2, 2, (1.0, 0.0))[2:]
    assert min(abs(x - at) for x in asked) < 3 * TOLERANCE


def test_it_finds_the_best_pair_in_three_trials(tmp_path: Path) -> None:
    """From the anchors: the two end points."""
    evaluate = Paraboloid(optimum_K=(0.0, 0.57, 0.43))
    options: dict[str, Any] = {"space": Pairwise(), "sampler": BrentSampler(), "segments_K": POINTS, "n_trials": 3}
    search = make_search(evaluate, tmp_path / "j", **options)
    search.run()
    assert search.winner.candidate.coordinates is not None
    assert search.winner.candidate.coordinates["lam"] == pytest.approx(0.43, abs=3 * TOLERANCE)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_searches_lengths_in_logarithms_and_in_either_direction(tmp_path: Path, mode: str) -> None:
    space = Decay(max_extrapolation=0)
    evaluate = Paraboloid(space.coefficients({"tau": 130.0}, SEGMENTS), sign=1 if mode == "min" else -1)
    search = make_search(evaluate, tmp_path / "j", space=space, sampler=BrentSampler(), mode=mode, n_trials=8)
    search.run()
    assert search.winner.candidate.coordinates is not None
    assert search.winner.candidate.coordinates["tau"] == pytest.approx(130, rel=0.03)


def test_it_goes_on_after_an_interruption_as_if_there_had_been_none(tmp_path: Path) -> None:
    """Goes red if it keeps something between two proposals."""
    options: dict[str, Any] = {"space": Decay(max_extrapolation=0), "sampler": BrentSampler(), "n_trials": 6}
    whole = make_search(Paraboloid(), tmp_path / "whole", **options)
    whole.run()
    with pytest.raises(HaltError):
        make_search(halting(11), tmp_path / "cut", **options).run()
    resumed = make_search(Paraboloid(), tmp_path / "cut", **options)
    resumed.run()
    assert proposals(resumed) == proposals(whole)


def test_whole_numbers_are_each_tried_once() -> None:
    study = optuna.create_study(sampler=BrentSampler())
    study.optimize(lambda t: (t.suggest_int("k", 1, 9) - 6.4) ** 2, n_trials=9)
    assert sorted(t.params["k"] for t in study.trials) == list(range(1, 10))
    assert 6 in [t.params["k"] for t in study.trials[:5]]
    study.optimize(lambda t: (t.suggest_int("k", 1, 9) - 6.4) ** 2, n_trials=1)


def test_two_processes_look_in_different_places() -> None:
    study = optuna.create_study(sampler=BrentSampler())
    x = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    asked = [study.ask(x).params["x"] for _ in range(4)]
    assert len({round(a, 3) for a in asked}) == 4


def test_more_than_one_coordinate_is_refused_at_the_first_trial(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"one numeric coordinate, got (tau, beta|beta, tau)\. Choose a space of one"):
        make_search(Paraboloid(), tmp_path / "anchored", sampler=BrentSampler()).run()
    study = optuna.create_study(sampler=BrentSampler())
    with pytest.raises(SearchError, match="got x, y"):
        study.ask({n: optuna.distributions.FloatDistribution(0.0, 1.0) for n in "xy"})


@pytest.mark.parametrize("tolerance", [0.0, 1.5, math.nan])
def test_a_bad_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="`0 < tolerance <= 1`"):
        BrentSampler(tolerance=tolerance)
