from __future__ import annotations

import numpy as np
import pytest

from lightning_ckmerge.report.surrogate import BAND, fit_surrogate, matern


@pytest.mark.parametrize("dims", [1, 2])
def test_it_passes_through_what_was_measured_and_is_sure_there(dims: int) -> None:
    rng = np.random.default_rng(dims)
    x_ND = rng.random((12, dims))
    y_N = 1.5 + 0.1 * ((x_ND - 0.4) ** 2).sum(1)
    process = fit_surrogate(x_ND, y_N)
    assert process is not None
    mean_N, deviation_N = process.predict(x_ND)
    np.testing.assert_allclose(mean_N, y_N, atol=2e-3 * np.ptp(y_N))
    assert deviation_N.max() < 0.05 * np.ptp(y_N)


def test_the_band_holds_unseen_values() -> None:
    """Goes red for a band that is too narrow: over 20 smooth functions, 95 % of it should hold; 85 % is asked for."""
    held = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        grid_MD = np.linspace(0, 1, 60)[:, None]
        cover = np.linalg.cholesky(matern(grid_MD / 0.3, grid_MD / 0.3) + 1e-9 * np.eye(60))
        y_M = cover @ rng.standard_normal(60)
        seen = rng.choice(60, 9, replace=False)
        process = fit_surrogate(grid_MD[seen], y_M[seen])
        assert process is not None
        mean_M, deviation_M = process.predict(grid_MD)
        held += (np.abs(y_M - mean_M) <= BAND * deviation_M + 1e-3).tolist()
    assert 0.85 < np.mean(held) < 1.0


def test_it_is_unsure_far_from_what_was_measured() -> None:
    process = fit_surrogate(np.linspace(0, 0.3, 6)[:, None], np.linspace(0.2, 0.5, 6) ** 2)
    assert process is not None
    near, far = process.predict(np.array([[0.15], [1.0]]))[1]
    assert far > 2 * near


@pytest.mark.parametrize("y", [[1.0, 2.0, 3.0], [1.0] * 6])
def test_too_few_or_equal_values_give_no_process(y: list[float]) -> None:
    assert fit_surrogate(np.linspace(0, 1, len(y))[:, None], np.array(y)) is None
