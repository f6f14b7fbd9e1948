"""One search as an Optuna study: continued after an interruption, by the same sampler, without a trace elsewhere."""

from __future__ import annotations

import math
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import torch
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.spaces import Interval
from lightning_ckmerge.errors import SearchError
from lightning_ckmerge.search.stopping import MIN_TRIALS, Stopping
from lightning_ckmerge.search.study import SearchStudy, make_sampler
from tests.support.paraboloid import HaltError, Paraboloid, halting, make_search, proposals


class Recording(GPSampler):
    """The default sampler, which keeps a list of what it proposed."""

    proposed: ClassVar[list[dict[str, Any]]] = []

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        params = super().sample_relative(study, trial, search_space)
        self.proposed.append(params)
        return params


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    monkeypatch.setattr(Recording, "proposed", [])
    return Recording(seed=0, n_startup_trials=0)


def open_study(storage: Path | str, fingerprint: str = "a", **options: Any) -> SearchStudy:
    chosen: dict[str, Any] = {"sampler": RandomSampler(seed=0), "intervals": {"x": Interval(low=0, high=1)}, **options}
    return SearchStudy(storage, "search", objectives=[Objective("loss", "min")], fingerprint=fingerprint, **chosen)


def study_names(journal: Path) -> list[str]:
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    return sorted(optuna.get_all_study_names(optuna.storages.JournalStorage(backend)))


def test_an_interrupted_search_goes_on_where_it_was(journal: Path, recording: Recording) -> None:
    """Goes red if the stored study is loaded without a sampler, for which Optuna takes TPE."""
    first = make_search(halting(14), journal, sampler=recording, n_trials=8)
    with pytest.raises(HaltError):
        first.run()
    assert len(first.anchors) == 9
    assert len(first.trials) == 4
    told, Recording.proposed[:] = proposals(first), []

    evaluate = Paraboloid()
    second = make_search(evaluate, journal, sampler=recording, n_trials=8)
    second.run()
    assert proposals(second)[:4] == told
    assert second.anchors == first.anchors
    assert second.trials[:4] == first.trials
    assert [c for _, c in proposals(second)[4:]] == Recording.proposed
    known = {t.candidate.coefficients_K for t in first.anchors + first.trials if t.candidate.coordinates}
    assert not known & set(evaluate.calls)
    assert study_names(journal) == ["search"]


def test_the_default_sampler_is_a_gaussian_process_for_values_without_noise() -> None:
    sampler = make_sampler(None, 3)
    assert isinstance(sampler, GPSampler)
    assert sampler._deterministic
    own = RandomSampler()
    assert make_sampler(own, 3) is own


def test_another_search_of_the_same_name_gets_a_study_of_its_own(journal: Path) -> None:
    """Values of other weights or other data would mislead the sampler."""
    assert open_study(journal, "a").study.study_name == "search"
    assert open_study(journal, "b").study.study_name == "search-v1"
    assert open_study(journal, "c").study.study_name == "search-v2"
    assert open_study(journal, "b").study.study_name == "search-v1"
    assert open_study(journal, "a").study.study_name == "search"
    assert study_names(journal) == ["search", "search-v1", "search-v2"]


def test_a_score_survives_the_storage(journal: Path) -> None:
    score = Score(value=1.5, metrics={"a": 2.0}, values_B=(1.0, 2.0), sizes_B=(3.0, 3.0), num_batches=2, complete=False)
    study = open_study(journal)
    asked, known = study.begin("trial-0")
    assert known is None
    study.tell("trial-0", score, {})
    assert open_study(journal).begin("trial-0") == (asked, score)
    assert open_study(journal).begin("trial-1")[1] is None


def test_an_anchor_is_asked_as_it_is(journal: Path) -> None:
    intervals = {"tau": Interval(low=1, high=1000, log=True), "k": Interval(low=1, high=9, integer=True)}
    study = open_study(journal, intervals=intervals)
    assert study.begin("anchor", {"tau": 120.5, "k": 4}) == ({"tau": 120.5, "k": 4}, None)
    drawn, _ = study.begin("trial-0")
    assert 1 <= drawn["tau"] <= 1000
    assert drawn["k"] in range(1, 10)


def test_what_was_under_way_is_asked_again(journal: Path) -> None:
    open_study(journal).begin("trial-0")
    study = open_study(journal)
    study.begin("trial-0")
    study.tell("trial-0", Score(value=1.0), {})
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    trials = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend)).trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_violation_that_is_not_finite_fails_the_trial(journal: Path, value: float) -> None:
    study = open_study(journal)
    study.begin("trial-0")
    study.tell("trial-0", Score(value=1.0), {"other": value})
    assert open_study(journal).begin("trial-0")[1] is None


@pytest.mark.parametrize("make", [lambda: TPESampler(seed=0), lambda: RandomSampler(seed=0)])
def test_a_sampler_given_by_the_user_starts_each_search_alike(tmp_path: Path, make: Callable[[], BaseSampler]) -> None:
    """Goes red if the object itself is used up: a search would depend on those before it."""
    sampler = make()
    searches = [make_search(Paraboloid(), tmp_path / str(i), sampler=sampler, n_trials=6) for i in range(2)]
    for search in searches:
        search.run()
    assert proposals(searches[0]) == proposals(searches[1])
    untouched = make_search(Paraboloid(), tmp_path / "untouched", sampler=make(), n_trials=6)
    untouched.run()
    assert proposals(untouched) == proposals(searches[0])


def test_any_optuna_storage_will_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(HaltError):
        make_search(halting(12), url, n_trials=4, sampler=RandomSampler(seed=0)).run()
    search = make_search(Paraboloid(), url, n_trials=4, sampler=RandomSampler(seed=0))
    search.run()
    study = optuna.load_study(study_name="search", storage=url)
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert [t.params for t in complete[-4:]] == [t.candidate.coordinates for t in search.trials]
    assert [t.value for t in complete[-4:]] == [t.search.value for t in search.trials]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_it_runs_where_gradients_are_off(tmp_path: Path, mode: Callable[[], Any]) -> None:
    """Validation hooks run there; a Gaussian process is fitted with gradients."""
    inside, outside = (make_search(Paraboloid(), tmp_path / n, n_trials=MIN_TRIALS + 2) for n in ("inside", "outside"))
    inside.stopping = outside.stopping = Stopping(min_gain_left=1e-9)
    with mode():
        inside.run()
        assert not torch.is_grad_enabled()
    outside.run()
    assert proposals(inside) == proposals(outside)


def test_nothing_outside_the_search_changes(journal: Path, capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    num_threads = torch.get_num_threads()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    search = make_search(Paraboloid(), journal, n_trials=MIN_TRIALS + 2)
    search.stopping = Stopping(min_gain_left=1e-9)
    search.run()
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]
    assert torch.get_num_threads() == num_threads
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


def test_a_line_that_a_full_disk_cut_short_costs_that_line_alone(journal: Path) -> None:
    """Goes red if the next write follows on the unfinished line: from then on no study of the run can be read."""
    open_study(journal, "a").begin("latest", {"x": 0.5})
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id"')
    for fingerprint in ("b", "c"):
        open_study(journal, fingerprint).begin("latest", {"x": 0.5})
    assert study_names(journal) == ["search", "search-v1", "search-v2"]


def test_the_lock_of_a_dead_process_is_taken_at_once(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes red if a run that died in a write to the journal waits for itself: 30 s in Optuna."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s")

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = journal.with_name("study.journal.lock")
    lock.write_text(f"{socket.gethostname()} {dead.pid}")
    monkeypatch.setattr(time, "sleep", wait)
    open_study(journal).begin("latest", {"x": 0.5})
    assert not lock.exists()
    lock.write_text(f"{socket.gethostname()} {os.getpid()}")
    with pytest.raises(SearchError) as caught:
        open_study(journal, "b")
    assert "it waits" in str(caught.value.__cause__)


def test_an_anchor_that_waited_when_the_process_died_is_not_asked_for_in_anothers_place(journal: Path) -> None:
    """Goes red if the study cannot be opened again, for Optuna tells no trial that waits, or if it comes as a trial."""
    open_study(journal).study.enqueue_trial({"x": 0.5})
    again = open_study(journal)
    assert [t.state.name for t in again.study.trials] == ["FAIL"]
    assert again.begin("trial-0")[0] == open_study(journal.with_name("other")).begin("trial-0")[0]
