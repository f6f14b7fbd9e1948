"""A Gaussian process over a study's trials. The one file that uses private names of Optuna.

Tested with Optuna 5.0: ``optuna._gp.gp.fit_kernel_params`` and ``GPRegressor.posterior``, ``optuna._gp.acqf``
(``LogEI``, ``LogPI``, ``UCB``), ``optuna._gp.optim_mixed.optimize_acqf_mixed``, ``optuna._gp.prior`` and
``optuna._gp.search_space.SearchSpace``.

Letters: N trials; M points; D coordinates, each scaled to [0, 1]. Values are standardised, and higher ones are better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from optuna._gp import acqf, gp, optim_mixed, prior
from optuna._gp.search_space import SearchSpace
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, create_trial

Array = NDArray[np.float64]
Acquisition = Literal["ei", "pi", "ucb"]

# scikit-optimize's defaults for its `gp_hedge`.
PI_MARGIN = 0.01
UCB_STANDARD_DEVIATIONS = 1.96


class GaussianProcess:
    """The posterior over an objective without noise, given N trials of it.

    Args:
        trials: N complete trials; at least 1.
        distributions: The D coordinates, which every trial has.
        sign: 1 if lower values are better, -1 if higher ones are.
    """

    def __init__(self, trials: Sequence[FrozenTrial], distributions: Mapping[str, BaseDistribution], sign: int) -> None:
        self._distributions = dict(distributions)
        self._space = SearchSpace(self._distributions)
        x_ND = self._space.get_normalized_params(list(trials))
        values_N = np.array([-sign * float(t.value or 0.0) for t in trials])
        self._sign = sign
        self._mean, self._scale = float(values_N.mean()), float(values_N.std()) or 1.0
        y_N = (values_N - self._mean) / self._scale
        self._best_y = float(y_N.max())
        self._best_x_D = x_ND[int(y_N.argmax())]
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            self._process = gp.fit_kernel_params(
                X=x_ND,
                Y=y_N,
                is_categorical=self._space.is_categorical,
                log_prior=prior.default_log_prior,
                minimum_noise=prior.DEFAULT_MINIMUM_NOISE_VAR,
                deterministic_objective=True,
            )

    def propose(self, acquisition: Acquisition, rng: np.random.RandomState) -> dict[str, Any]:
        """Return the coordinates at which the acquisition function is highest."""
        x_D, _ = self._maximise(self._function(acquisition), rng)
        return self._space.get_unnormalized_param(x_D)

    def mean(self, z_D: Mapping[str, Any]) -> float:
        """Return the posterior mean at ``z_D``, in standard deviations of the trials' values above their mean."""
        x_1D = self._space.get_normalized_params(
            [create_trial(params=dict(z_D), distributions=self._distributions, value=0.0)]
        )
        with torch.no_grad():
            return float(self._process.posterior(torch.from_numpy(x_1D))[0])

    def predict(self, x_MD: Array) -> tuple[Array, Array]:
        """Return the posterior mean and standard deviation at M points of the unit cube, in the metric's unit."""
        with torch.no_grad():
            y_M, variance_M = self._process.posterior(torch.from_numpy(x_MD))
        mean_M = -self._sign * (self._mean + self._scale * y_M.numpy())
        return mean_M, self._scale * variance_M.clamp_min(0.0).sqrt().numpy()

    def expected_improvement(self, rng: np.random.RandomState) -> float:
        """Return the highest expected improvement over the best trial, in the metric's unit."""
        _, log_improvement = self._maximise(self._function("ei"), rng)
        return self._scale * math.exp(log_improvement)

    def _function(self, acquisition: Acquisition) -> acqf.BaseAcquisitionFunc:
        if acquisition == "ei":
            return acqf.LogEI(self._process, self._space, threshold=self._best_y)
        if acquisition == "pi":
            return acqf.LogPI(self._process, self._space, threshold=self._best_y + PI_MARGIN)
        return acqf.UCB(self._process, self._space, beta=UCB_STANDARD_DEVIATIONS**2)

    def _maximise(
        self, function: acqf.BaseAcquisitionFunc, rng: np.random.RandomState
    ) -> tuple[np.ndarray[Any, Any], float]:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            x_D, value = optim_mixed.optimize_acqf_mixed(
                function, warmstart_normalized_params_array=self._best_x_D[None], rng=rng
            )
        return x_D, float(value)
