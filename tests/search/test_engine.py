"""The search on a paraboloid: what wins, what is told to Optuna, when it stops."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from lightning_ckmerge.config import AnchorName, Constraint
from lightning_ckmerge.core.outcome import Score, Scored
from lightning_ckmerge.core.spaces import Decay, Pairwise, Space, Tail, Window
from lightning_ckmerge.errors import MonitorError, SearchError
from lightning_ckmerge.search import engine
from lightning_ckmerge.search.problem import Half, KeepGoing
from lightning_ckmerge.search.racing import MIN_BATCHES
from lightning_ckmerge.search.stopping import Budget
from tests.support.paraboloid import OPTIMUM, SEGMENTS, Paraboloid, make_search
from tests.support.segments import means, with_latest


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "merges" / "study.journal"


def stored(journal: Path, name: str = "search") -> dict[str, FrozenTrial]:
    """Return what is in the journal, by candidate."""
    backend = optuna.storages.journal.JournalFileBackend(str(journal))
    study = optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    return {t.user_attrs["name"]: t for t in study.trials}


def names(trials: Sequence[Scored]) -> list[str]:
    return [t.candidate.name for t in trials]


@pytest.mark.parametrize("staged", [True, False])
def test_it_finds_the_optimum_of_the_decay_space(journal: Path, staged: bool) -> None:
    evaluate = Paraboloid()
    search = make_search(evaluate, journal, n_trials=16, staged=staged)
    search.run()
    best = min(evaluate.loss(t.candidate.coefficients_K) for t in search.anchors)
    assert search.winner in search.trials
    assert evaluate.loss(search.winner.candidate.coefficients_K) < 0.1 * best
    assert len(search.trials) == 16
    assert all(math.fsum(t.candidate.coefficients_K) == pytest.approx(1, abs=1e-12) for t in search.trials)


def test_it_finds_the_best_pair(journal: Path) -> None:
    """The two end points come first; the newer one is the latest weights, which are not scored twice."""
    segments_K = with_latest(means([100] * 3), steps_since=100)
    space = Pairwise()
    evaluate = Paraboloid(space.coefficients({"lam": 0.43}, segments_K))
    search = make_search(evaluate, journal, space=space, segments_K=segments_K, n_trials=8)
    search.run()
    assert search.winner.candidate.coordinates == pytest.approx({"lam": 0.43}, abs=0.02)
    anchored = evaluate.calls[: len(search.anchors)]
    assert evaluate.loss(search.winner.candidate.coefficients_K) < min(map(evaluate.loss, anchored))
    assert [t.candidate.coordinates for t in search.anchors if t.candidate.coordinates] == [{"lam": 1.0}, {"lam": 0.0}]
    assert len(anchored) == len(set(anchored))


def test_it_searches_whole_numbers(journal: Path) -> None:
    space = Window()
    segments_K = with_latest(means([100] * 9))
    evaluate = Paraboloid(space.coefficients({"k": 5, "tilt": 1.0}, segments_K))
    search = make_search(evaluate, journal, space=space, previous={"k": 40, "tilt": 0.0})
    search.run()
    assert all(t.candidate.coordinates["k"] in range(1, 10) for t in search.trials if t.candidate.coordinates)
    assert evaluate.loss(search.winner.candidate.coefficients_K) < 0.01


def test_maximising_is_minimising_in_a_mirror(tmp_path: Path) -> None:
    down = make_search(Paraboloid(), tmp_path / "min", mode="min", n_trials=6)
    up = make_search(Paraboloid(sign=-1), tmp_path / "max", mode="max", n_trials=6)
    down.run()
    up.run()
    for ours, theirs in zip(down.anchors + down.trials, up.anchors + up.trials, strict=True):
        assert theirs.candidate == ours.candidate
        assert theirs.search.value == pytest.approx(-ours.search.value)
        assert theirs.search.num_batches == ours.search.num_batches
    assert names([up.winner, up.best_anchor]) == names([down.winner, down.best_anchor])


def test_the_latest_weights_win_a_draw(journal: Path) -> None:
    search = make_search(Paraboloid(change=lambda c_K, loss: 1.0), journal, n_trials=2)
    search.run()
    search.confirm()
    assert search.winner is search.best_anchor is search.latest
    assert search.latest.candidate.name == "latest"
    assert search.latest.confirm is not None


def test_where_a_search_begins_is_no_known_merge(journal: Path) -> None:
    """The best of those may have been dropped early, since the search began better."""
    start = Decay().initial(SEGMENTS)[0]
    evaluate = Paraboloid(Decay().coefficients(start, SEGMENTS), noise=0.3, jitter=0.02)
    search = make_search(evaluate, journal, previous=start, n_trials=2)
    search.run()
    search.confirm()
    assert search.winner.candidate.name == "previous"
    known = [t for t in search.anchors if t.candidate.name not in ("previous", "initial-0")]
    assert search.best_anchor is min(known, key=lambda t: t.search.value) is not search.latest
    assert not search.best_anchor.search.complete
    assert search.best_anchor.confirm is not None
    assert search.best_anchor.confirm.complete


@pytest.mark.parametrize("seed", range(2))
def test_staged_evaluation_finds_the_same_for_less(tmp_path: Path, seed: int) -> None:
    """The noise over batches is as large as the gains; the paired differences are not."""
    staged, full = (Paraboloid(noise=0.3, jitter=0.02, batches=32 + seed) for _ in range(2))
    quick = make_search(staged, tmp_path / "staged")
    slow = make_search(full, tmp_path / "full", staged=False)
    quick.run()
    slow.run()
    assert quick.winner.search.complete
    assert staged.loss(quick.winner.candidate.coefficients_K) == pytest.approx(
        full.loss(slow.winner.candidate.coefficients_K), abs=5e-3
    )
    assert staged.scored_batches < 0.6 * full.scored_batches
    assert quick.num_batches == staged.scored_batches
    assert quick.num_batches + quick.num_batches_saved == slow.num_batches
    assert slow.num_batches_saved == 0


def near_draws() -> Paraboloid:
    """All merges gain 1 over the latest weights, but for a thousandth that depends on the coefficients."""
    return Paraboloid(noise=0.5, change=lambda c_K, loss: 1.0 if c_K[-1] == 1 else 1e-3 * loss)


def test_what_promises_next_to_nothing_is_dropped(journal: Path) -> None:
    """Every trial that is better than the incumbent, by a thousandth of the gain: the best of them is scored to its
    end, and wins."""
    evaluate = near_draws()
    search = make_search(evaluate, journal)
    search.run()
    complete = [t for t in search.anchors + search.trials if t.search.complete]
    assert complete == [*search.anchors[:2], search.winner]
    assert search.winner.search.num_batches == MIN_BATCHES + evaluate.batches
    told = [t.value for t in stored(journal).values()]
    assert search.winner.search.value == pytest.approx(min(told), abs=1e-9)
    assert search.num_batches == evaluate.scored_batches
    assert search.num_batches + search.num_batches_saved == evaluate.batches * len(search.anchors + search.trials)


def test_the_winner_of_a_near_draw_is_the_same_for_an_interrupted_search(journal: Path) -> None:
    """What was told is its estimate."""
    whole = make_search(near_draws(), journal)
    whole.run()
    again = make_search(near_draws(), journal)
    again.run()
    assert again.winner == whole.winner


def test_a_near_draw_is_left_where_the_budget_is_spent(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes a second. Before the last trial 88 are spent, and 20 more allowed, after it 92."""
    evaluate = near_draws()
    clock = SimpleNamespace(monotonic=lambda: float(evaluate.scored_batches))
    monkeypatch.setattr(engine, "time", clock)
    search = make_search(evaluate, journal, budget=Budget(110, clock=clock.monotonic), n_trials=6)
    search.run()
    assert evaluate.scored_batches == 92
    assert search.winner is search.anchors[1]
    assert search.stopped_early is None


def test_a_dropped_candidates_estimate_is_told(journal: Path) -> None:
    """Its own batches alone would say more about the batches than about the candidate."""
    evaluate = Paraboloid(noise=0.5, jitter=0.001)
    search = make_search(evaluate, journal)
    search.run()
    dropped = [t for t in search.trials if not t.search.complete]
    assert dropped
    level = search.latest.search.value - evaluate.loss(search.latest.candidate.coefficients_K)
    for trial in dropped:
        told = stored(journal)[trial.candidate.name]
        assert told.state == TrialState.COMPLETE
        assert told.value == trial.search.value
        assert told.value == pytest.approx(evaluate.loss(trial.candidate.coefficients_K) + level, abs=0.02)
        assert trial is not search.winner


def test_constraints_keep_a_candidate_from_winning_and_are_told(journal: Path) -> None:
    """`other` falls with the oldest snapshot's coefficient. The optimum, an anchor here, has a negative one."""
    other = Constraint(monitor="other", allowance=0.01, mode="max")
    evaluate = Paraboloid(metrics=lambda c_K: {"other": min(0.0, c_K[0])})
    search = make_search(evaluate, journal, constraints=(other,), previous={"tau": 150.0, "beta": 1.0}, n_trials=4)
    search.run()
    optimum = search.anchors[1]
    assert optimum.candidate.coefficients_K == OPTIMUM
    assert not optimum.feasible
    scored = search.anchors + search.trials
    assert optimum.search.value == min(t.search.value for t in scored)
    assert search.winner.search.value == min(t.search.value for t in scored if t.feasible)
    for trial in [optimum, *search.trials]:
        (violation,) = stored(journal)[trial.candidate.name].constraints.values()
        assert violation == pytest.approx(-min(0.0, trial.candidate.coefficients_K[0]) - 0.01)
        assert trial.feasible == (violation <= 0)
        # Measured on the same batches as the latest weights'.
        assert trial.search.complete


def test_a_constraint_must_be_logged(journal: Path) -> None:
    search = make_search(Paraboloid(), journal, constraints=(Constraint(monitor="other_loss"),))
    with pytest.raises(MonitorError, match=r"got 'other_loss'\. Logged are: val_loss\."):
        search.run()


def beyond(c_K: Sequence[float], value: float) -> float:
    """NaN for extrapolating candidates, as when a merge overflows."""
    return math.nan if min(c_K) < 0 else value


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("staged", [True, False])
def test_a_candidate_without_a_value_loses_and_is_told_as_bad(journal: Path, staged: bool, mode: str) -> None:
    sign = 1 if mode == "min" else -1
    evaluate = Paraboloid(change=beyond, sign=sign)
    search = make_search(evaluate, journal, staged=staged, mode=mode, n_trials=6)
    search.run()
    lost = [t for t in search.trials if math.isnan(t.search.value)]
    told = [t for t in stored(journal).values() if t.state == TrialState.COMPLETE]
    assert lost
    assert set(names(lost)) <= {t.user_attrs["name"] for t in told}
    for i, trial in enumerate(told):
        if trial.user_attrs["name"] in names(lost):
            finite = [sign * t.value for t in told[:i] if t.user_attrs["name"] not in names(lost)]
            assert sign * trial.value == pytest.approx(2 * max(finite) - min(finite))
    assert math.isfinite(search.winner.search.value)
    assert min(search.winner.candidate.coefficients_K) >= 0


def test_the_sampler_keeps_away_from_where_merges_have_no_value(tmp_path: Path) -> None:
    """Goes red if such trials fail: nothing is learnt of them, and the optimum's neighbourhood is asked again."""
    merges = Paraboloid(change=lambda c_K, loss: math.nan if loss < 0.01 else loss)
    search = make_search(merges, tmp_path / "j", n_trials=12)
    search.run()
    assert 1 <= sum(math.isnan(t.search.value) for t in search.trials) <= 3


@pytest.mark.parametrize("staged", [True, False])
def test_infinitely_good_is_not_good(journal: Path, staged: bool) -> None:
    overflow = Paraboloid(change=lambda c_K, loss: -math.inf if min(c_K) < 0 else loss)
    search = make_search(overflow, journal, staged=staged, previous={"tau": 150.0, "beta": 1.0}, n_trials=1)
    search.run()
    assert not any(t.search.complete and math.isfinite(t.search.value) for t in search.anchors[1:2])
    assert math.isfinite(search.winner.search.value)


def test_what_was_not_scored_to_its_end_does_not_win(journal: Path) -> None:
    """However good it looks."""

    class Cut(Paraboloid):
        def __call__(self, c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
            score = super().__call__(c_K, half)
            if len(self.calls) <= 3:
                return score
            return replace(score, value=-9.0, values_B=(-9.0,) * 4, sizes_B=(1.0,) * 4, num_batches=4, complete=False)

    search = make_search(Cut(), journal, n_trials=1)
    search.run()
    assert all(t.search.value < search.winner.search.value for t in search.anchors[3:])
    assert search.winner in search.anchors[:3]


def test_a_candidate_whose_constraint_has_no_value_loses_and_is_told_as_broken(journal: Path) -> None:
    evaluate = Paraboloid(metrics=lambda c_K: {"other": beyond(c_K, c_K[0])})
    constraints = (Constraint(monitor="other", allowance=0.5),)
    search = make_search(evaluate, journal, constraints=constraints, n_trials=6)
    search.run()
    lost = [t for t in search.trials if math.isnan(t.search.metrics["other"])]
    assert lost
    assert all(stored(journal)[n].constraints["other"] > 0 for n in names(lost))
    assert all(stored(journal)[n].value == t.search.value for n, t in zip(names(lost), lost, strict=True))
    assert not any(t.feasible for t in lost)
    assert min(search.winner.candidate.coefficients_K) >= 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latest_weights_without_a_value_end_the_search(journal: Path, value: float) -> None:
    search = make_search(Paraboloid(change=lambda c_K, loss: value), journal)
    with pytest.raises(SearchError, match=rf"must be finite.* got {value}\. Look at the training run"):
        search.run()
    assert not journal.exists()


@pytest.mark.parametrize(
    ("allowed_s", "num_scored", "scored"),
    [(0.5, 1, "1 anchor and 0 trials"), (10.5, 9, "9 anchors and 0 trials"), (11.5, 10, "9 anchors and 1 trial")],
)
def test_it_stops_before_it_exceeds_its_budget(
    journal: Path, allowed_s: float, num_scored: int, scored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation takes a second, and one more is kept for the verdict."""
    evaluate = Paraboloid()
    clock = SimpleNamespace(monotonic=lambda: float(len(evaluate.calls)))
    monkeypatch.setattr(engine, "time", clock)
    budget = Budget(allowed_s, reason="`search.timeout_s`", reserved_batches=20, clock=clock.monotonic)
    search = make_search(evaluate, journal, budget=budget, staged=False)
    search.run()
    assert len(evaluate.calls) == num_scored
    assert search.stopped_early == (
        f"after {scored}: the search would take {num_scored + 2} s, but `search.timeout_s` allows {allowed_s:.3g} s "
        f"({num_scored} s spent so far)"
    )


def test_anchors_by_name_are_scored_first_and_count_against_the_budget(journal: Path) -> None:
    """A soup's candidates depend on the scores of the snapshots alone, so no list of them exists before."""
    evaluate = Paraboloid()
    anchors: tuple[AnchorName, ...] = ("best-single", "greedy-soup", "metrics-weighted")
    search = make_search(evaluate, journal, space=Window(), anchors=anchors, n_trials=1)
    seen: list[int] = []
    search.on_scored = lambda trial, total: seen.append(total)
    search.run()
    scored = names(search.anchors)
    assert scored[:10] == ["latest", *(f"single-{100 * (k + 1)}" for k in range(9))]
    assert scored[10:-2] == [f"greedy-soup-{i}" for i in range(9)]
    # A power of 100 leaves the best snapshot, which is scored already.
    assert scored[-2:] == ["metrics-weighted-1", "metrics-weighted-10"]
    assert seen == [1 + 9 + 9 + 3 + 1] * len(search.anchors + search.trials)
    soup = next(t for t in search.anchors if t.candidate.name == "greedy-soup-0")
    singles = sorted(search.anchors[:10], key=lambda t: t.search.value)
    best = {t.candidate.coefficients_K.index(1.0) for t in singles[:2]}
    assert {k for k, c in enumerate(soup.candidate.coefficients_K) if c == 0.5} == best


def test_the_budget_may_end_between_two_soups(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Paraboloid()
    clock = SimpleNamespace(monotonic=lambda: float(len(evaluate.calls)))
    monkeypatch.setattr(engine, "time", clock)
    budget = Budget(14.5, reason="`search.timeout_s`", reserved_batches=20, clock=clock.monotonic)
    search = make_search(evaluate, journal, budget=budget, staged=False, space=Window(), anchors=("greedy-soup",))
    search.run()
    assert names(search.anchors)[-1] == "greedy-soup-2"
    assert search.stopped_early is not None
    assert search.stopped_early.startswith("after 13 anchors and 0 trials")


def test_without_anchors_the_latest_weights_come_first(journal: Path) -> None:
    search = make_search(Paraboloid(), journal, space=Window(), anchors=(), n_trials=2)
    search.run()
    assert names(search.anchors + search.trials) == ["latest", "trial-0", "trial-1"]


def test_everyone_is_told_of_each_candidate(journal: Path) -> None:
    seen: list[tuple[str, int]] = []
    search = make_search(Paraboloid(), journal, n_trials=3)
    search.on_scored = lambda trial, total: seen.append((trial.candidate.name, total))
    search.run()
    expected = [*names(search.anchors), "trial-0", "trial-1", "trial-2"]
    assert seen == [(name, len(expected)) for name in expected]


def test_only_what_the_verdict_needs_is_confirmed(journal: Path) -> None:
    search = make_search(Paraboloid(), journal, n_trials=8)
    search.run()
    search.confirm()
    confirmed = [t for t in search.anchors + search.trials if t.confirm is not None]
    assert confirmed == [search.latest, search.best_anchor, search.winner]
    assert len({t.confirm.values_B for t in confirmed if t.confirm}) == 3
    assert search.seconds.keys() == {"anchors", "trials", "confirm"}


def won(journal: Path, space: Space, seed: int, gain: float) -> bool:
    """Whether any of a few merges, each better by ``gain`` standard deviations of a batch, beats the latest weights."""

    def evaluate(c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
        draws = random.Random(repr((seed, half, tuple(c_K))))
        values_B: list[float] = []
        while len(values_B) < 32:
            values_B.append(draws.gauss(0 if c_K[-1] == 1 else -gain, 1))
            if keep_going is not None and not keep_going(values_B, [1.0] * len(values_B)):
                break
        mean, num = math.fsum(values_B) / len(values_B), len(values_B)
        sizes_B = (1.0,) * num
        return Score(value=mean, values_B=tuple(values_B), sizes_B=sizes_B, num_batches=num, complete=num == 32)

    search = make_search(evaluate, journal, name=str(seed), space=space, anchors=(), n_trials=3)
    search.run()
    return search.winner is not search.latest


def test_a_tail_must_be_better_for_certain(journal: Path) -> None:
    """The best of four that gain nothing seems to gain more often than not; of noise alone none may win."""
    seeds = range(12)
    assert sum(won(journal.with_name("decay"), Decay(), seed, gain=0.0) for seed in seeds) > 6
    assert sum(won(journal.with_name("tail"), Tail(), seed, gain=0.0) for seed in seeds) == 0
    assert all(won(journal.with_name("clear"), Tail(), seed, gain=3.0) for seed in seeds[:4])
