"""Several monitored metrics: the search is for their Pareto front, and its knee wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Score, Scored
from lightning_ckmerge.core.spaces import Decay
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.engine import MAX_SHOWN, Search
from lightning_ckmerge.search.hedge import GPHedgeSampler
from lightning_ckmerge.search.problem import Half, KeepGoing
from lightning_ckmerge.search.study import make_sampler
from tests.support.paraboloid import OPTIMUM, SEGMENTS, Paraboloid, make_search

ELSEWHERE = Decay().coefficients({"tau": 400.0, "beta": 0.2}, SEGMENTS)
OTHERS = (Objective("other", "max"),)


class Two:
    """The distance from one optimum, to be low, and the negative one from another, to be high."""

    def __init__(self) -> None:
        self.first, self.second = Paraboloid(), Paraboloid(optimum_K=ELSEWHERE, sign=-1)
        self.asked: list[KeepGoing | None] = []

    def __call__(self, c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
        self.asked.append(keep_going)
        return replace(self.first(c_K, half), others=(self.second(c_K, half),))


def search_of(evaluate: Any, path: Path, sampler: Any = None, **problem: Any) -> Search:
    search = make_search(evaluate, path / "j", sampler=sampler or RandomSampler(0), others=OTHERS, **problem)
    search.run()
    return search


def losses(trial: Scored) -> tuple[float, float]:
    return trial.search.value, -trial.search.others[0].value


def test_the_front_is_what_nothing_beats_and_the_winner_its_knee(tmp_path: Path) -> None:
    evaluate = Two()
    search = search_of(evaluate, tmp_path, n_trials=30)
    everything = [*search.anchors, *search.trials]
    table = {t.candidate.name: losses(t) for t in everything}
    rows = table.values()
    beaten = {n for n, r in table.items() if any(o != r and o[0] <= r[0] and o[1] <= r[1] for o in rows)}
    assert {t.candidate.name for t in search.front} == table.keys() - beaten
    assert len(search.front) > 3
    assert [losses(t) for t in search.front] == sorted(losses(t) for t in search.front)
    low, high = ([f(column) for column in zip(*map(losses, search.front), strict=True)] for f in (min, max))
    sums = [sum((v - a) / (b - a) for v, a, b in zip(losses(t), low, high, strict=True)) for t in search.front]
    assert search.winner is search.front[sums.index(min(sums))]
    assert not any(evaluate.asked), "what loses by one metric may lie on the front by another"


def test_merges_along_the_front_are_confirmed(tmp_path: Path) -> None:
    search = search_of(Two(), tmp_path, n_trials=30)
    assert len(search.front) > MAX_SHOWN
    search.confirm()
    shown, front = search.shown, search.front
    assert len(shown) == MAX_SHOWN
    assert {front[0].candidate.name, front[-1].candidate.name, search.winner.candidate.name} <= {
        t.candidate.name for t in shown
    }
    assert all(t.confirm is not None for t in (*shown, search.latest, search.best_anchor))


def test_where_both_metrics_agree_there_is_one_best(tmp_path: Path) -> None:
    class Same(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second = Paraboloid(optimum_K=OPTIMUM, sign=-1)

    search = search_of(Same(), tmp_path)
    assert search.front == [search.winner]
    assert search.winner.search.value == min(t.search.value for t in (*search.anchors, *search.trials))


def test_a_metric_without_a_value_keeps_a_candidate_off_the_front(tmp_path: Path) -> None:
    class Broken(Two):
        def __call__(self, c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
            score = super().__call__(c_K, half, keep_going)
            lost = replace(score.others[0], value=float("nan"))
            return replace(score, others=(lost,)) if len(self.asked) % 2 == 0 else score

    search = search_of(Broken(), tmp_path)
    assert search.front
    assert all(t.search.others[0].value == t.search.others[0].value for t in search.front)


def test_an_interrupted_search_goes_on_with_all_its_values(tmp_path: Path) -> None:
    first = search_of(Two(), tmp_path, n_trials=3)
    again = Two()
    second = search_of(again, tmp_path, n_trials=5)
    assert [t.search for t in second.trials[:3]] == [t.search for t in first.trials]
    outside = [t for t in second.anchors[1:] if t.candidate.coordinates is None]
    assert len(again.asked) == 1 + len(outside) + 2


def test_the_default_sampler_searches_by_several_metrics(tmp_path: Path) -> None:
    search = search_of(Two(), tmp_path, sampler=make_sampler(None, 0), n_trials=2)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "j")))
    study = optuna.load_study(study_name="search", storage=storage)
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    told = {t.user_attrs["name"]: t.values for t in study.trials}
    for trial in search.trials:
        assert told[trial.candidate.name] == [trial.search.value, trial.search.others[0].value]


def test_a_sampler_that_knows_one_metric_says_so(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="`GPHedgeSampler` searches by one metric, got 2"):
        search_of(Two(), tmp_path, sampler=GPHedgeSampler(seed=0))
