"""One search by several processes: every trial once, none lost, nobody waits for the dead."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.spaces import Interval
from lightning_ckmerge.search import study as study_module
from lightning_ckmerge.search.study import SharedStudy
from tests.support.ranks import forkserver
from tests.support.waiting import wait_until


def open_shared(storage: Path | str, n_trials: int = 4, seed: int = 0, fingerprint: str = "f" * 64) -> SharedStudy:
    return SharedStudy(
        storage,
        "search",
        n_trials=n_trials,
        sampler=RandomSampler(seed=seed),
        intervals={"x": Interval(low=0, high=1)},
        objectives=[Objective("loss", "min")],
        fingerprint=fingerprint,
    )


def stored(study: SharedStudy) -> list[Any]:
    return study._study.get_trials()


def score_of(z: dict[str, float]) -> Score:
    return Score(value=(z["x"] - 0.5) ** 2, num_batches=1)


def work(storage: str, n_trials: int, seed: int, seconds: float, evaluated: Any) -> list[float]:
    study = open_shared(storage, n_trials, seed)
    coordinates = []
    for i in range(n_trials):
        z, score = study.begin(f"trial-{i}")
        if score is None:
            time.sleep(seconds)
            evaluated.append(z["x"])
            study.tell(f"trial-{i}", score_of(z), {})
        coordinates.append(z["x"])
    return coordinates


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else tmp_path / "study.journal"


def test_processes_share_the_trials_and_each_learns_all(storage: Path | str) -> None:
    """They start together, before there is any table."""
    context = forkserver()
    with context.Manager() as manager:
        evaluated = manager.list()
        with context.Pool(3) as pool:
            jobs = [pool.apply_async(work, (storage, 9, seed, 0.05, evaluated)) for seed in range(3)]
            found = [job.get(timeout=600) for job in jobs]
        total = len(evaluated)
    # Two may ask for the last one at the same moment.
    assert 9 <= total <= 11
    assert all(len(set(f)) == 9 for f in found)
    if total == 9:
        assert sorted(found[0]) == sorted(found[1]) == sorted(found[2])


@pytest.fixture
def polls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Grows whenever a study waits for another process; it waits for a hundredth of a second."""
    found: list[float] = []
    pause = time.sleep

    def sleep(seconds: float) -> None:
        found.append(seconds)
        pause(0.01)

    monkeypatch.setattr(study_module, "time", SimpleNamespace(sleep=sleep))
    return found


def test_a_process_waits_for_what_another_is_doing(storage: Path | str, polls: list[float]) -> None:
    a, b = open_shared(storage, n_trials=1), open_shared(storage, n_trials=1)
    z, known = a.begin("trial-0")
    assert known is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(b.begin, "trial-0")
        wait_until(lambda: len(polls) > 2 or waiting.done())
        assert not waiting.done()
        a.tell("trial-0", score_of(z), {})
        assert waiting.result(timeout=600) == (z, score_of(z))


def test_a_search_goes_on_after_all_processes_have_died(storage: Path | str) -> None:
    first = open_shared(storage, n_trials=3)
    z, _ = first.begin("trial-0")
    first.tell("trial-0", score_of(z), {})
    second = open_shared(storage, n_trials=3)
    assert second.begin("trial-0") == (z, score_of(z))
    assert second.begin("trial-1")[1] is None


def ask_and_die(storage: str) -> None:
    open_shared(storage, n_trials=1).begin("trial-0")


def test_nobody_waits_for_a_process_that_died_on_this_machine(storage: Path | str) -> None:
    process = forkserver().Process(target=ask_and_die, args=(storage,))
    process.start()
    process.join(600)
    study = open_shared(storage, n_trials=1)
    assert study.begin("trial-0")[1] is None
    assert [t.state for t in stored(study)] == [TrialState.FAIL, TrialState.RUNNING]


def test_nobody_waits_for_ever_for_a_process_elsewhere(
    storage: Path | str, polls: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = open_shared(storage, n_trials=1)
    lost._worker = {"host": "elsewhere", "pid": 1}
    z, _ = lost.begin("trial-0")
    study = open_shared(storage, n_trials=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(study.begin, "trial-0")
        wait_until(lambda: polls or waiting.done())
        assert not waiting.done()
        monkeypatch.setattr(study_module, "MIN_PATIENCE_S", 0)
        assert waiting.result(timeout=600)[1] is None
    lost.tell("trial-0", score_of(z), {})  # too late, and no error
    assert [t.state for t in stored(study)] == [TrialState.FAIL, TrialState.RUNNING]


def test_an_anchor_is_scored_again_rather_than_waited_for(storage: Path | str) -> None:
    a, b = open_shared(storage), open_shared(storage)
    fixed = {"x": 0.25}
    assert a.begin("ema-3", fixed) == b.begin("ema-3", fixed) == (fixed, None)
    a.tell("ema-3", score_of(fixed), {})
    b.tell("ema-3", score_of(fixed), {})
    assert b.begin("ema-3", fixed) == (fixed, score_of(fixed))
    assert [t.state for t in stored(a)] == [TrialState.COMPLETE]


def test_a_value_that_is_not_finite_is_a_trial_like_any_other(storage: Path | str) -> None:
    a, b = open_shared(storage, n_trials=1), open_shared(storage, n_trials=1)
    a.begin("trial-0")
    a.tell("trial-0", Score(value=float("inf"), num_batches=1), {})
    score = b.begin("trial-0")[1]
    assert score is not None
    assert score.value == float("inf")


def test_other_data_is_another_study(storage: Path | str) -> None:
    a, b = open_shared(storage), open_shared(storage, fingerprint="0" * 64)
    assert a.study.study_name != b.study.study_name
    assert len(optuna.get_all_study_names(a._study._storage)) == 2
