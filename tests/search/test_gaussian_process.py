"""The posterior that samplers ask and reports draw."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import create_trial

from lightning_ckmerge.search.gaussian_process import Array, GaussianProcess


def fitted(x_ND: Array, y_N: Array, sign: int = 1) -> GaussianProcess:
    names = [f"z{d}" for d in range(x_ND.shape[1])]
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in names}
    trials = [
        create_trial(params=dict(zip(names, map(float, x_D), strict=True)), distributions=distributions, value=float(y))
        for x_D, y in zip(x_ND, y_N, strict=True)
    ]
    return GaussianProcess(trials, distributions, sign)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dims", [1, 2])
def test_it_passes_through_the_trials_and_is_sure_there(dims: int, sign: int) -> None:
    """Goes red if a value's sign, mean or scale is not put back."""
    rng = np.random.default_rng(dims)
    x_ND = rng.random((12, dims))
    y_N = 1.5 + 0.1 * ((x_ND - 0.4) ** 2).sum(1)
    mean_N, deviation_N = fitted(x_ND, y_N, sign).predict(x_ND)
    np.testing.assert_allclose(mean_N, y_N, atol=1e-2 * np.ptp(y_N))
    assert deviation_N.max() < 0.05 * np.ptp(y_N)


def test_it_is_unsure_far_from_the_trials() -> None:
    process = fitted(np.linspace(0, 0.3, 6)[:, None], np.linspace(0.2, 0.5, 6) ** 2)
    near, far = process.predict(np.array([[0.15], [1.0]]))[1]
    assert far > 2 * near
