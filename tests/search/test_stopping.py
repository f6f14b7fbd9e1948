"""When a search has found enough: never too early, alike in every mode and after every interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.terminator import (
    BaseTerminator,
    BestValueStagnationEvaluator,
    RegretBoundEvaluator,
    StaticErrorEvaluator,
    Terminator,
)
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.core.spaces import Decay
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.stopping import MIN_TRIALS, Stopping
from tests.support.paraboloid import HaltError, Paraboloid, halting, make_search

NUM_TRIALS = 20


class GoldenSampler(BaseSampler):
    """Steps through the range by golden sections; the study's values are its only state, so a resumed search agrees."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        assert isinstance(param_distribution, FloatDistribution)
        low, high = param_distribution.low, param_distribution.high
        known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        share = len(known) * (math.sqrt(5) - 1) / 2 % 1
        return math.exp((1 - share) * math.log(low) + share * math.log(high))


def search_of(
    path: Path, evaluate: Paraboloid | None = None, stopping: Stopping | None = None, **options: Any
) -> Search:
    search = make_search(evaluate or Paraboloid(), path / "j", n_trials=NUM_TRIALS, **options)
    search.stopping = stopping or Stopping(min_gain_left=0.01)
    return search


def test_it_stops_where_less_than_the_share_is_left(tmp_path: Path) -> None:
    search = search_of(tmp_path)
    search.run()
    assert MIN_TRIALS <= len(search.trials) < NUM_TRIALS
    assert search.found_enough
    assert search.stopped_early is not None
    expected = f"after 9 anchors and {len(search.trials)} trials: further trials should add only 0."
    assert search.stopped_early.startswith(expected)
    assert search.stopped_early.endswith(" % of the gain, less than `search.min_gain_left`")


def test_a_smaller_share_takes_longer_and_none_runs_all_trials(tmp_path: Path) -> None:
    lengths, left = [], []
    for share in (0.1, 0.001, 0.0):
        search = search_of(tmp_path / str(share), stopping=Stopping(min_gain_left=share))
        search.run()
        lengths.append(len(search.trials))
        # The optimum's loss is 0.
        left.append(Paraboloid().loss(search.winner.candidate.coefficients_K))
    assert lengths == sorted(set(lengths))
    assert left == sorted(set(left), reverse=True)
    assert lengths[-1] == NUM_TRIALS
    assert search.stopped_early is None
    assert not search.found_enough


def test_it_never_stops_before_the_fewest_trials(tmp_path: Path) -> None:
    search = search_of(tmp_path, stopping=Stopping(min_gain_left=0.99))
    search.run()
    assert len(search.trials) == MIN_TRIALS


def test_where_nothing_was_gained_there_is_no_share_to_speak_of(tmp_path: Path) -> None:
    search = search_of(tmp_path, Paraboloid(change=lambda c_K, loss: 1.0 + (c_K[-1] < 1) * (1 + loss)))
    search.run()
    assert search.winner is search.latest
    assert len(search.trials) == NUM_TRIALS


def test_maximising_stops_alike(tmp_path: Path) -> None:
    down, up = search_of(tmp_path / "min"), search_of(tmp_path / "max", Paraboloid(sign=-1), mode="max")
    down.run()
    up.run()
    assert up.stopped_early == down.stopped_early
    assert [t.candidate for t in up.trials] == [t.candidate for t in down.trials]


@pytest.mark.parametrize("num_trials", [3, MIN_TRIALS, 8])
def test_an_interrupted_search_stops_where_an_uninterrupted_one_does(tmp_path: Path, num_trials: int) -> None:
    """Goes red if a process asks again before trials that are known, when the study holds later ones too."""

    def search(name: str, evaluate: Paraboloid) -> Search:
        options = {"space": Decay(max_extrapolation=0), "sampler": GoldenSampler()}
        return search_of(tmp_path / name, evaluate, Stopping(min_gain_left=1e-3), **options)

    whole = search("whole", Paraboloid())
    whole.run()
    assert 8 < len(whole.trials) < NUM_TRIALS
    with pytest.raises(HaltError):
        search("halted", halting(len(whole.anchors) + num_trials + 1)).run()
    for _ in range(2):  # and a third process does as the second
        resumed = search("halted", Paraboloid())
        resumed.run()
        assert (resumed.trials, resumed.stopped_early) == (whole.trials, whole.stopped_early)


def test_the_budget_comes_first(tmp_path: Path) -> None:
    search = search_of(tmp_path, stopping=Stopping(min_gain_left=0.99))
    search.budget.stop_reason = lambda num_batches: "spent" if len(search.trials) == 3 else None  # type: ignore[method-assign]
    search.run()
    assert search.stopped_early == "after 9 anchors and 3 trials: spent"
    assert not search.found_enough


def test_optunas_terminator_stops_where_the_best_value_stagnates(tmp_path: Path) -> None:
    terminator = Terminator(BestValueStagnationEvaluator(max_stagnation_trials=4), min_n_trials=1)
    search = search_of(tmp_path, stopping=Stopping(terminator=terminator))
    search.run()
    told = [t.search.value for t in (*search.anchors, *search.trials) if t.candidate.coordinates]
    assert len(search.trials) < NUM_TRIALS
    assert told.index(min(told)) == len(told) - 1 - 5
    assert search.found_enough
    assert search.stopped_early == (
        f"after 9 anchors and {len(search.trials)} trials: `search.terminator` (Terminator) stopped the search"
    )


def test_optunas_terminator_stops_where_the_regret_is_bound(tmp_path: Path) -> None:
    def make(constant: float) -> Terminator:
        return Terminator(RegretBoundEvaluator(seed=0, min_n_trials=4), StaticErrorEvaluator(constant), min_n_trials=8)

    lengths = []
    for constant in (10.0, 0.01, 0.0):
        stopping = Stopping(terminator=make(constant))
        # Again where the evaluator's random numbers decide: goes red if the first search used them up.
        searches = [search_of(tmp_path / f"{constant}-{i}", stopping=stopping) for i in range(1 + (constant == 0.01))]
        for search in searches:
            search.run()
        assert searches[0].trials == searches[-1].trials
        lengths.append(len(searches[0].trials))
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == NUM_TRIALS


class Third(BaseTerminator):
    """Says stop when it is asked for the third time."""

    num_asked = 0

    def should_terminate(self, study: Study) -> bool:
        self.num_asked += 1
        return self.num_asked == 3


def test_a_terminator_begins_every_time_alike(tmp_path: Path) -> None:
    """It would tell something else after an interruption, and in the next search."""
    terminator = Third()
    search = search_of(tmp_path, stopping=Stopping(terminator=terminator))
    search.run()
    assert terminator.num_asked == 0
    assert len(search.trials) == NUM_TRIALS


def test_a_terminator_that_fails_is_named(tmp_path: Path) -> None:
    """Optuna's default wants scores of a cross-validation."""
    search = search_of(tmp_path, stopping=Stopping(terminator=Terminator(min_n_trials=1)))
    with pytest.raises(SearchError, match=r"`search\.terminator` must tell .*, got ValueError from Terminator: "):
        search.run()


def test_nothing_is_expected_of_a_point(tmp_path: Path) -> None:
    """Nor is there anything to fit."""
    study = optuna.create_study()
    for _ in range(MIN_TRIALS):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(1, 1)})
        study.tell(trial, 1.0)
    reason = Stopping(min_gain_left=0.01).reason(study, num_trials=MIN_TRIALS, gain=1.0)
    assert reason is not None
    assert Stopping(min_gain_left=0.01).reason(study, num_trials=MIN_TRIALS, gain=math.nan) is None
