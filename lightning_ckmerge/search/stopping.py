"""When a search ends: it has found enough, or one more evaluation would exceed its budget."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.exceptions import ExperimentalWarning
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import TrialState

from lightning_ckmerge.core.wording import amount_told
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.gaussian_process import GaussianProcess
from lightning_ckmerge.search.study import sign_of_direction

if TYPE_CHECKING:
    from optuna.terminator import BaseTerminator

# A Gaussian process without noise is overconfident. On the tests' paraboloid it expected 0.5 % after
# six trials, where 1.1 % was left, and 0.09 % after eight, where 0.6 % was: the default share is small for that reason.
MIN_TRIALS = 6


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Asked after each of the sampler's trials. The study alone decides, so a resumed search stops at the same trial.

    Args:
        min_gain_left: Share of the gain over the latest weights that must be left to expect; 0: never stop.
        terminator: Optuna's, asked first; a fresh copy each time, so that it starts in the same state.
    """

    min_gain_left: float = 0.0
    terminator: BaseTerminator | None = None

    def reason(self, study: Study, *, num_trials: int, gain: float) -> str | None:
        """Return why no further trial is worth its cost; ``None`` if one is.

        Args:
            study: All results so far, by one metric.
            num_trials: The sampler's trials among it.
            gain: The winner's over the latest weights, in the metric's unit.

        Raises:
            SearchError: The terminator fails.
        """
        if self.terminator is not None and _says_stop(self.terminator, study):
            return f"`search.terminator` ({type(self.terminator).__name__}) stopped the search"
        if not self.min_gain_left or num_trials < MIN_TRIALS or not gain > 0:
            return None
        share = expected_improvement(study) / gain
        if share >= self.min_gain_left:
            return None
        return f"further trials should add only {100 * share:.2g} % of the gain, less than `search.min_gain_left`"


NEVER = Stopping()


def expected_improvement(study: Study) -> float:
    """Return the highest expected improvement of one more trial, in the metric's unit, by a Gaussian process."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    varied = {name: d for name, d in intersection_search_space(trials).items() if not d.single()}
    sign = sign_of_direction(study.direction)
    return GaussianProcess(trials, varied, sign).expected_improvement(np.random.RandomState(0)) if varied else 0.0


def _says_stop(terminator: BaseTerminator, study: Study) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return bool(copy.deepcopy(terminator).should_terminate(study))
    except Exception as error:  # third-party code
        raise SearchError(
            f"`search.terminator` must tell from a study's trials whether to stop, got {type(error).__name__} from "
            f"{type(terminator).__name__}: {error} Optuna's `Terminator` needs `error_evaluator`: StaticErrorEvaluator."
        ) from error


class Budget:
    """Seconds that one search may take, and seconds that a batch takes, as measured so far.

    Args:
        allowed_s: Seconds; ``None``: no limit.
        reason: Names the argument that set the limit, for messages.
        reserved_batches: Batch evaluations that the verdict will need in any case.
        clock: Seconds on a clock that never goes back.

    Attributes:
        forecast_s: Seconds from the search's start to its end, by the last ``stop_reason``.
    """

    def __init__(
        self,
        allowed_s: float | None = None,
        *,
        reason: str = "",
        reserved_batches: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed_s = allowed_s
        self._reason = reason
        self._reserved_batches = reserved_batches
        self._clock = clock
        self._start = clock()
        self.forecast_s = 0.0
        self._evaluating_s = 0.0
        self._num_batches = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._start

    def spent(self, seconds: float, num_batches: int) -> None:
        """Take one evaluation into the forecast."""
        self._evaluating_s += seconds
        self._num_batches += num_batches

    def stop_reason(self, num_batches: int) -> str | None:
        """Why ``num_batches`` more batch evaluations would exceed the budget; ``None`` if they fit."""
        if self._allowed_s is None:
            return None
        seconds_per_batch = self._evaluating_s / max(1, self._num_batches)
        self.forecast_s = self.elapsed_s + seconds_per_batch * (num_batches + self._reserved_batches)
        if self.forecast_s <= self._allowed_s:
            return None
        takes, allowed, spent = map(amount_told, (self.forecast_s, self._allowed_s, self.elapsed_s))
        return f"the search would take {takes} s, but {self._reason} allows {allowed} s ({spent} s spent so far)"
