"""The paper's sampler: a Gaussian process whose acquisition function is chosen by past performance (GP-Hedge)."""

from __future__ import annotations

from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.checks import checked, require_at_least, require_positive
from lightning_ckmerge.search.gaussian_process import Acquisition, GaussianProcess
from lightning_ckmerge.search.study import require_one_objective, sign_of_direction

ACQUISITIONS: tuple[Acquisition, ...] = ("ei", "pi", "ucb")


class GPHedgeSampler(BaseSampler):
    """Proposes by expected improvement, probability of improvement or an upper confidence bound.

    Each nominates a point, and one of the three is drawn with probability proportional to ``exp(eta gain)``. Once its
    value is known, every nominee's gain grows by the new posterior mean there. Gains start at 0 in every search.
    Constraints do not guide it: a search picks its winner among the trials that hold them anyway.

    Args:
        seed: Of the draws.
        n_startup_trials: Trials, anchors in the space included, before the first proposal; those in between are
            random. 2: the end points of ``pairwise``, as in the paper.
        eta: How much a better past counts; above 0.

    Source:
        Liu et al. 2024, arXiv:2403.19390, section 3. GP-Hedge: Brochu, Hoffman and de Freitas 2011, "Portfolio
        Allocation for Bayesian Optimization", arXiv:1009.5419, algorithm 2.
    """

    @checked()
    def __init__(self, *, seed: int | None = None, n_startup_trials: int = 2, eta: float = 1.0) -> None:
        require_at_least("n_startup_trials", n_startup_trials, 1, "A Gaussian process needs a trial to begin with.")
        require_positive("eta", eta, "The default is 1.")
        self._rng = np.random.RandomState(seed)
        self._independent = RandomSampler(seed)
        self._n_startup_trials = n_startup_trials
        self._eta = eta
        self._gains = dict.fromkeys(ACQUISITIONS, 0.0)
        self._nominees: dict[Acquisition, dict[str, Any]] = {}

    def reseed_rng(self) -> None:
        """Draw from fresh entropy from now on."""
        self._rng.seed()
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the coordinates that all trials share and that can vary."""
        require_one_objective(study, self)
        shared = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: d for name, d in shared.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return one of the three nominees; nothing before there are trials enough."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not search_space or len(trials) < self._n_startup_trials:
            return {}
        process = GaussianProcess(trials, search_space, sign_of_direction(study.direction))
        for acquisition, z_D in self._nominees.items():
            self._gains[acquisition] += process.mean(z_D)
        self._nominees = {acquisition: process.propose(acquisition, self._rng) for acquisition in ACQUISITIONS}
        weights = np.exp(self._eta * (np.array(list(self._gains.values())) - max(self._gains.values())))
        return self._nominees[ACQUISITIONS[self._rng.choice(len(ACQUISITIONS), p=weights / weights.sum())]]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)
