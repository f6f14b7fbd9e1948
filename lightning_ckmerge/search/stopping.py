"""When a search has found enough, whatever it may still spend."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState

from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.gaussian_process import GaussianProcess

if TYPE_CHECKING:
    from optuna.terminator import BaseTerminator

# A Gaussian process without noise is too sure of what it has not seen. On the tests' paraboloid it expected 0.5 % after
# six trials, where 1.1 % was left, and 0.09 % after eight, where 0.6 % was: the default share is small for that reason.
MIN_TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Asked after each of the sampler's trials. The answer depends on the study alone, so a resumed search stops alike.

    Args:
        min_gain_left: Share of the gain over the latest weights that must be left to expect; 0: never stop.
        terminator: Optuna's, asked first; a copy each time, so that it begins every time alike.
    """

    min_gain_left: float = 0.0
    terminator: BaseTerminator | None = None

    def reason(self, study: Study, *, num_trials: int, gain: float) -> str | None:
        """Return why no further trial is worth its while; ``None`` if one is.

        Args:
            study: What has been told so far, by one metric.
            num_trials: The sampler's trials among it.
            gain: The winner's over the latest weights, in the metric's unit.

        Raises:
            SearchError: The terminator fails.
        """
        if self.terminator is not None and _says_stop(self.terminator, study):
            return f"`search.terminator`, {type(self.terminator).__name__}, says so"
        if not self.min_gain_left or num_trials < MIN_TRIALS or not gain > 0:
            return None
        share = expected_improvement(study) / gain
        if share >= self.min_gain_left:
            return None
        return f"{100 * share:.2g} % of the gain is left to expect, less than `search.min_gain_left`"


NEVER = Stopping()


def expected_improvement(study: Study) -> float:
    """Return the highest expected improvement of one more trial, in the metric's unit, by a Gaussian process."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = {name: d for name, d in intersection_search_space(trials).items() if not d.single()}
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return GaussianProcess(trials, varied, sign).expected_improvement(np.random.RandomState(0)) if varied else 0.0


def _says_stop(terminator: BaseTerminator, study: Study) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return bool(copy.deepcopy(terminator).should_terminate(study))
    except Exception as error:  # anybody's code
        raise SearchError(
            f"`search.terminator` must tell from a study's trials whether to stop, got {type(error).__name__} from "
            f"{type(terminator).__name__}: {error} Optuna's `Terminator` needs `error_evaluator`: StaticErrorEvaluator."
        ) from error
