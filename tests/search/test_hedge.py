"""The paper's sampler and the Gaussian process under it, on the parabola that a pair's loss is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import create_trial

from lightning_ckmerge.core.spaces import Pairwise
from lightning_ckmerge.errors import ConfigError
from lightning_ckmerge.search.gaussian_process import GaussianProcess
from lightning_ckmerge.search.hedge import ACQUISITIONS, GPHedgeSampler
from tests.support.paraboloid import POINTS, Paraboloid, make_search

UNIT = {"x": FloatDistribution(0.0, 1.0)}


def trials_of(values: dict[float, float]) -> list[optuna.trial.FrozenTrial]:
    return [create_trial(params={"x": x}, distributions=UNIT, value=v) for x, v in values.items()]


def test_the_papers_loop_finds_the_best_pair(tmp_path: Path) -> None:
    """The end points first, then the sampler; eight evaluations of a parabola are enough for 0.02."""
    evaluate = Paraboloid(optimum_K=(0.0, 0.57, 0.43))
    search = make_search(
        evaluate, tmp_path / "j", space=Pairwise(), sampler=GPHedgeSampler(seed=0), segments_K=POINTS, n_trials=6
    )
    search.run()
    assert {"lam": 1.0} in [t.candidate.coordinates for t in search.anchors]
    assert {"lam": 0.0} in [t.candidate.coordinates for t in search.anchors]
    assert search.winner.candidate.coordinates is not None
    assert search.winner.candidate.coordinates["lam"] == pytest.approx(0.43, abs=0.02)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_hedging_leaves_the_nominee_that_never_pays(direction: str) -> None:
    """Gains are posterior means of what was nominated, in either direction: all nominees end up near the optimum."""
    sign = 1 if direction == "minimize" else -1
    sampler = GPHedgeSampler(seed=1)
    study = optuna.create_study(direction=direction, sampler=sampler)
    for x in (0.0, 1.0):
        study.enqueue_trial({"x": x})
    study.optimize(lambda t: sign * (t.suggest_float("x", 0, 1) - 0.3) ** 2, n_trials=12)
    assert study.best_params["x"] == pytest.approx(0.3, abs=0.03)
    assert all(gain > 0 for gain in sampler._gains.values())


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_each_acquisition_looks_between_good_points(acquisition: str, sign: int) -> None:
    trials = trials_of({0.0: sign * 1.0, 0.4: sign * 0.1, 0.6: sign * 0.1, 1.0: sign * 1.0})
    process = GaussianProcess(trials, UNIT, sign)
    x = process.propose(acquisition, np.random.RandomState(0))["x"]  # type: ignore[arg-type]
    assert 0.4 < x < 0.6
    assert process.mean({"x": 0.5}) > process.mean({"x": 0.2}) > process.mean({"x": 0.0})


def test_expected_improvement_is_in_the_metrics_unit_and_fades() -> None:
    """A thousand times the values, a thousand times the improvement; a fine grid leaves next to nothing."""
    coarse = {x: (x - 0.37) ** 2 for x in (0.0, 0.5, 1.0)}
    fine = {x / 10: (x / 10 - 0.37) ** 2 for x in range(11)}
    improvements = [
        GaussianProcess(trials_of(v), UNIT, 1).expected_improvement(np.random.RandomState(0))
        for v in (coarse, {x: 1000 * y for x, y in coarse.items()}, fine)
    ]
    assert improvements[1] == pytest.approx(1000 * improvements[0], rel=0.01)
    assert improvements[2] < 0.1 * improvements[0]
    assert improvements[2] < 0.01 * max(fine.values())


@pytest.mark.parametrize("arguments", [{"eta": 0.0}, {"n_startup_trials": 0}])
def test_bad_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        GPHedgeSampler(**arguments)  # type: ignore[arg-type]
