"""The verdict: its interval covers the truth as often as it says, and its sentence says what it found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lightning_ckmerge.config import Objective
from lightning_ckmerge.core.outcome import Candidate, Score, Trial, Verdict
from lightning_ckmerge.search.slope import Progress
from lightning_ckmerge.search.verdict import MIN_CONFIRM_BATCHES, paired_gain, reach_verdict, serial_inflation

NUM_DRAWS = 400


def score(
    values_B: Sequence[float] | None, sizes_B: Sequence[float] | None = None, value: float | None = None
) -> Score:
    if values_B is None:
        assert value is not None
        return Score(value=value)
    sizes = tuple(sizes_B or [1.0] * len(values_B))
    mean = sum(v * w for v, w in zip(values_B, sizes, strict=True)) / sum(sizes)
    return Score(value=mean, values_B=tuple(values_B), sizes_B=sizes, num_batches=len(sizes))


def trial(name: str, confirm: Score | None, search: float = 0.0) -> Trial:
    return Trial(candidate=Candidate(name=name, coefficients_K=(1.0,)), search=Score(value=search), confirm=confirm)


def verdict(winner: Trial, latest: Trial, anchor: Trial | None = None, mode: str = "min") -> Verdict:
    return reach_verdict(winner, latest, anchor or latest, monitor="val_loss", mode=mode)


def noisy(level: float, jitter: float = 0.01, num_batches: int = 12, seed: int = 0) -> Score:
    """Return a score of which the batches differ much, and paired differences little."""
    shared, own = random.Random(1), random.Random(f"{seed} {level}")
    return score([level + shared.gauss(0, 1) + own.gauss(0, jitter) for _ in range(num_batches)])


@pytest.mark.parametrize("num_batches", [MIN_CONFIRM_BATCHES, 20])
@pytest.mark.parametrize("equal_sizes", [True, False])
def test_the_interval_covers_the_true_gain_as_often_as_it_says(num_batches: int, equal_sizes: bool) -> None:
    """Goes red with a normal instead of a t quantile: 88 % at five batches."""
    rng = random.Random(num_batches)
    covered = 0
    for _ in range(NUM_DRAWS):
        # As in practice: full batches, and a smaller last one.
        sizes_B = [8.0] * (num_batches - 1) + [8.0 if equal_sizes else 5.0]
        theirs_B = [rng.gauss(3, 1) for _ in range(num_batches)]
        ours_B = [v - 0.2 + rng.gauss(0, 0.3) for v in theirs_B]
        _, interval = paired_gain(trial("a", score(ours_B, sizes_B)), trial("b", score(theirs_B, sizes_B)), 1)
        assert interval is not None
        covered += interval[0] <= 0.2 <= interval[1]
    assert 0.92 <= covered / NUM_DRAWS <= 0.98


def test_batches_of_one_document_widen_the_interval() -> None:
    """Differences that drift slowly: 81 % of intervals cover the truth, 63 % if taken for independent draws."""
    rng = random.Random(0)
    covered = 0
    for _ in range(NUM_DRAWS):
        drift, ours_B = 0.0, []
        for _ in range(40):
            drift = 0.6 * drift + rng.gauss(0, 0.3)
            ours_B.append(drift - 0.2)
        gain, interval = paired_gain(trial("a", score(ours_B)), trial("b", score([0.0] * 40)), 1)
        assert interval is not None
        assert interval[0] < gain < interval[1]
        covered += interval[0] <= 0.2 <= interval[1]
    assert covered / NUM_DRAWS > 0.8


def test_differences_that_alternate_do_not_narrow_it() -> None:
    assert serial_inflation([1.0, -1.0] * 10) == 1
    assert serial_inflation([1.0] * 10 + [-1.0] * 10) > 2
    assert serial_inflation([0.0] * 5) == 1


def test_where_there_is_no_gain_few_merges_are_accepted() -> None:
    accepted = 0
    for seed in range(NUM_DRAWS):
        rng = random.Random(seed)
        ours, theirs = (score([rng.gauss(0, 1) for _ in range(8)]) for _ in range(2))
        accepted += verdict(trial("trial-0", ours), trial("latest", theirs)).status == "accepted"
    assert accepted / NUM_DRAWS < 0.05


def test_a_gain_weighs_batches_by_their_samples() -> None:
    sizes_B = [10.0, 10.0, 10.0, 10.0, 1.0]
    ours, theirs = trial("a", score([1.0, 2.0, 3.0, 4.0, 50.0], sizes_B)), trial("b", score([2.0] * 5, sizes_B))
    gain, _ = paired_gain(ours, theirs, 1)
    assert ours.confirm is not None
    assert gain == pytest.approx(2.0 - ours.confirm.value)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_gain_on_unseen_batches_is_accepted(mode: str) -> None:
    sign = 1 if mode == "min" else -1
    latest, anchor, winner = (trial(n, noisy(sign * v)) for n, v in [("latest", 3.0), ("ema-9", 2.6), ("trial-4", 2.5)])
    found = verdict(winner, latest, anchor, mode)
    assert found.status == "accepted"
    assert found.gain == pytest.approx(0.5, abs=0.02)
    assert found.interval is not None
    assert 0.45 < found.interval[0] < found.gain < found.interval[1] < 0.55
    assert (found.best_anchor, found.gain_over_best_anchor) == ("ema-9", pytest.approx(0.1, abs=0.02))
    assert found.interval_over_best_anchor is not None
    assert found.sentence == (
        f"Merging gains {found.gain:.4g} val_loss over the latest weights (95 % {found.interval[0]:.4g} to "
        f"{found.interval[1]:.4g}), and {found.gain_over_best_anchor:.4g} over the best anchor, ema-9."
    )


FALLING = Progress(900, ([(700, 5.0), (800, 4.5), (900, 4.0)],))


def test_a_gain_is_told_in_training_steps() -> None:
    latest, winner = trial("latest", noisy(3.0)), trial("trial-4", noisy(2.5))
    found = reach_verdict(winner, latest, latest, monitor="val_loss", mode="min", progress=FALLING)
    assert found.equivalent_steps == pytest.approx(100, abs=5)
    told = f"), as much as about {found.equivalent_steps} further training steps at the current slope, and "
    assert told in found.sentence
    assert verdict(winner, latest).equivalent_steps is None
    assert "slope" not in verdict(winner, latest).sentence


def test_a_gain_that_is_not_confirmed_is_worth_no_steps() -> None:
    latest, winner = trial("latest", noisy(3.0)), trial("trial-4", noisy(3.2))
    found = reach_verdict(winner, latest, latest, monitor="val_loss", mode="max", progress=FALLING)
    assert found.equivalent_steps is None  # the metric falls, though it should rise
    found = reach_verdict(winner, latest, latest, monitor="val_loss", mode="min", progress=FALLING)
    assert (found.status, found.equivalent_steps) == ("rejected", None)


def test_an_anchor_may_win() -> None:
    latest, anchor = trial("latest", noisy(3.0)), trial("ema-9", noisy(2.6))
    found = verdict(anchor, latest, anchor)
    assert (found.status, found.gain_over_best_anchor, found.interval_over_best_anchor) == ("accepted", 0.0, None)
    assert found.sentence.endswith("by ema-9.")


@pytest.mark.parametrize("level", [3.0, 3.2])
def test_no_gain_on_unseen_batches_is_rejected(level: float) -> None:
    """Whatever the search half said."""
    latest, winner = trial("latest", noisy(3.0), search=3.0), trial("trial-4", noisy(level, jitter=0.1), search=2.0)
    found = verdict(winner, latest)
    assert found.status == "rejected"
    assert found.interval is not None
    assert found.interval[0] <= 0
    assert found.sentence.startswith("Merging does not help: on unseen batches the best candidate changes val_loss by")


def test_a_search_that_the_latest_weights_win_is_rejected() -> None:
    latest = trial("latest", noisy(3.0))
    found = verdict(latest, latest)
    assert (found.status, found.gain, found.interval) == ("rejected", 0.0, None)
    assert "no candidate beats the latest weights' val_loss" in found.sentence


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (noisy(2.0, num_batches=4), noisy(3.0, num_batches=4), "4 validation batches are too few for an interval"),
        (noisy(2.0, num_batches=12), noisy(3.0, num_batches=11), "they were measured on 12 and 11 batches"),
        (score(None, value=2.0), score(None, value=3.0), "there are no values by batch"),
    ],
    ids=["few batches", "not the same batches", "no batch values"],
)
def test_a_gain_without_an_interval_is_unconfirmed(ours: Score, theirs: Score, why: str) -> None:
    """And the sentence says what is missing."""
    winner, latest = trial("trial-4", ours), trial("latest", theirs)
    latest = replace(latest, search=noisy(3.0))
    found = verdict(winner, latest)
    assert (found.status, found.interval) == ("unconfirmed", None)
    assert found.gain == pytest.approx(theirs.value - ours.value)
    assert found.sentence.startswith(f"Unconfirmed: merging seems to gain {found.gain:.4g} val_loss over the latest")
    assert f"weights, but {why}" in found.sentence


def test_too_few_blocks_are_called_blocks() -> None:
    """A metric that is no mean over batches has no values by batch on the search half."""
    winner, latest = (trial(n, noisy(level, num_batches=4)) for n, level in [("trial-4", 2.0), ("latest", 3.0)])
    found = verdict(winner, latest)
    assert found.status == "unconfirmed"
    assert "val_loss is no mean over batches, and its 4 blocks of validation batches are too few" in found.sentence


def test_the_search_half_confirms_nothing() -> None:
    """Where one batch could not be split."""
    winner, latest = (
        Trial(candidate=Candidate(name=n, coefficients_K=(1.0,)), search=noisy(level))
        for n, level in [("trial-4", 2.0), ("latest", 3.0)]
    )
    found = verdict(winner, latest)
    assert (found.status, found.interval) == ("unconfirmed", None)
    assert found.gain == pytest.approx(1.0, abs=0.1)
    assert "no validation batches are left to confirm it" in found.sentence


def test_a_winner_without_a_value_on_unseen_batches_is_rejected() -> None:
    found = verdict(trial("trial-4", score([float("nan")] * 9)), trial("latest", noisy(3.0, num_batches=9)))
    assert found.status == "rejected"


def test_warnings_are_kept() -> None:
    latest = trial("latest", noisy(3.0))
    assert reach_verdict(latest, latest, latest, monitor="a", mode="min", warnings=("b",)).warnings == ("b",)


OTHERS = (Objective("val_acc", "max"),)


def both(name: str, loss: Score, accuracy: Score) -> Trial:
    return trial(name, replace(loss, others=(accuracy,)))


def verdict_of_both(winner: Trial, latest: Trial) -> Verdict:
    return reach_verdict(
        winner, latest, latest, monitor="val_loss", mode="min", others=OTHERS, front=[winner], progress=FALLING
    )


def test_of_several_metrics_one_gain_and_no_loss_is_accepted() -> None:
    latest = both("latest", noisy(3.0), noisy(0.5, seed=1))
    found = verdict_of_both(both("trial-4", noisy(2.5), noisy(0.5, seed=2)), latest)
    assert found.status == "accepted"
    (other,) = found.others
    assert (other.monitor, other.mode, found.front) == ("val_acc", "max", ("trial-4",))
    assert other.interval is not None
    assert other.interval[0] < 0 < other.interval[1]
    assert found.equivalent_steps is not None
    assert found.sentence.startswith(f"Merging gains {found.gain:.4g} val_loss (")
    assert found.sentence.endswith("at the current slope, by trial-4, of a Pareto front of 1.")


def test_a_gain_in_another_metric_than_the_first_is_worth_no_steps() -> None:
    latest = both("latest", noisy(3.0), noisy(0.5, seed=1))
    found = verdict_of_both(both("trial-4", noisy(3.0, seed=3), noisy(0.9)), latest)
    assert (found.status, found.equivalent_steps) == ("accepted", None)


@pytest.mark.parametrize(
    ("loss", "accuracy", "status"),
    [
        (noisy(2.5), noisy(0.4), "rejected"),  # a certain loss
        (noisy(3.0, seed=3), noisy(0.5, seed=2), "rejected"),  # nothing certain
        (noisy(2.5), score([float("nan")] * 12), "rejected"),
        (noisy(2.5), score(None, value=0.9), "unconfirmed"),
    ],
)
def test_of_several_metrics_nothing_less_is_accepted(loss: Score, accuracy: Score, status: str) -> None:
    found = verdict_of_both(both("trial-4", loss, accuracy), both("latest", noisy(3.0), noisy(0.5, seed=1)))
    assert (found.status, found.equivalent_steps) == (status, None)
    if status == "unconfirmed":
        assert "no values by batch for an interval. Log val_acc on every validation batch." in found.sentence


def test_the_intervals_of_several_metrics_hold_together() -> None:
    """Goes red with one interval's 95 % for each of five: 77 % of draws hold all."""
    rng, held = random.Random(0), 0
    others = tuple(Objective(f"m{i}", "min") for i in range(4))
    for _ in range(NUM_DRAWS):
        ours, theirs = ([score([rng.gauss(0, 1) for _ in range(12)]) for _ in range(5)] for _ in range(2))
        winner, latest = (
            trial(n, replace(s[0], others=tuple(s[1:]))) for n, s in (("trial-0", ours), ("latest", theirs))
        )
        found = reach_verdict(winner, latest, latest, monitor="m", mode="min", others=others)
        intervals = [found.interval, *(g.interval for g in found.others)]
        held += all(i is not None and i[0] <= 0 <= i[1] for i in intervals)
    assert held / NUM_DRAWS > 0.9
