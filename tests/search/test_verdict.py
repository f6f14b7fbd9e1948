"""The verdict: its interval covers the truth as often as it says, and its sentence says what it found."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Candidate, Score, Scored, Verdict
from lightning_ckmerge.search.interval import MIN_CONFIRM_BATCHES, serial_inflation
from lightning_ckmerge.search.verdict import Progress, paired_gain, reach_verdict

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


def trial(name: str, confirm: Score | None, search: float = 0.0) -> Scored:
    """Return a candidate with values by batch on the search half, which no verdict looks at."""
    found = Score(value=search, values_B=(search,) * 4)
    return Scored(candidate=Candidate(name=name, coefficients_K=(1.0,)), search=found, confirm=confirm)


def verdict(winner: Scored, latest: Scored, anchor: Scored | None = None, mode: str = "min") -> Verdict:
    return reach_verdict(winner, latest, anchor or latest, objectives=[Objective("val_loss", mode)])


def noisy(level: float, jitter: float = 0.01, num_batches: int = 12, seed: int = 0) -> Score:
    """Return a score of which the batches differ much, and paired differences little."""
    shared, own = random.Random(1), random.Random(f"{seed} {level}")
    return score([level + shared.gauss(0, 1) + own.gauss(0, jitter) for _ in range(num_batches)])


@pytest.mark.parametrize("num_batches", [MIN_CONFIRM_BATCHES, 20])
@pytest.mark.parametrize("equal_sizes", [True, False])
def test_the_interval_covers_the_true_gain_as_often_as_it_says(num_batches: int, equal_sizes: bool) -> None:
    """Goes red with a normal quantile: 88 % at five batches. Without skewness it covers more often than it says."""
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
    assert covered / NUM_DRAWS >= 0.95


def test_batches_of_one_document_widen_the_interval() -> None:
    """Differences that drift slowly: 90 % of intervals cover the truth, 63 % if taken for independent draws."""
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
    assert covered / NUM_DRAWS > 0.87


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


@pytest.mark.parametrize("num_batches", [MIN_CONFIRM_BATCHES, 16, 64])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_null_merges_that_lose_much_on_a_few_batches_are_not_accepted(num_batches: int, mode: str) -> None:
    """Log-normal losses of mean 0: goes red with Student's interval, which accepts 17, 13 and 9 %."""
    rng, sign, draws = random.Random(num_batches), 1 if mode == "min" else -1, 2 * NUM_DRAWS
    accepted = 0
    for _ in range(draws):
        ours_B = [sign * (rng.lognormvariate(0, 1) - math.exp(0.5)) for _ in range(num_batches)]
        _, interval = paired_gain(trial("a", score(ours_B)), trial("b", score([0.0] * num_batches)), sign)
        assert interval is not None
        accepted += interval[0] > 0
    assert accepted / draws < 0.045


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
    assert found.num_differences == 12


FALLING = Progress(900, ([(700, 5.0), (800, 4.5), (900, 4.0)],))


def test_a_gain_is_told_in_training_steps() -> None:
    latest, winner = trial("latest", noisy(3.0)), trial("trial-4", noisy(2.5))
    found = reach_verdict(winner, latest, latest, objectives=[Objective("val_loss", "min")], progress=FALLING)
    assert found.equivalent_steps == pytest.approx(100, abs=5)
    told = f" About {found.equivalent_steps} further training steps at the current slope would gain as much."
    assert found.sentence.endswith(told)
    assert verdict(winner, latest).equivalent_steps is None
    assert "slope" not in verdict(winner, latest).sentence


def test_a_gain_that_is_not_confirmed_is_worth_no_steps() -> None:
    latest, winner = trial("latest", noisy(3.0)), trial("trial-4", noisy(3.2))
    found = reach_verdict(winner, latest, latest, objectives=[Objective("val_loss", "max")], progress=FALLING)
    assert found.equivalent_steps is None  # the metric falls, though it should rise
    found = reach_verdict(winner, latest, latest, objectives=[Objective("val_loss", "min")], progress=FALLING)
    assert (found.status, found.equivalent_steps) == ("rejected", None)
    close = trial("trial-4", noisy(3.0, jitter=0.1))
    found = reach_verdict(close, latest, latest, objectives=[Objective("val_loss", "min")], progress=FALLING)
    assert (found.status, found.equivalent_steps) == ("unconfirmed", None)


def test_an_anchor_may_win() -> None:
    latest, anchor = trial("latest", noisy(3.0)), trial("ema-9", noisy(2.6))
    found = verdict(anchor, latest, anchor)
    assert (found.status, found.gain_over_best_anchor, found.interval_over_best_anchor) == ("accepted", 0.0, None)
    assert "anchor" not in found.sentence


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("change", "status"), [(-0.2, "accepted"), (0.0, "unconfirmed"), (0.2, "rejected")])
def test_the_interval_decides(mode: str, change: float, status: str) -> None:
    """Whatever the search half said."""
    sign = 1 if mode == "min" else -1
    latest = trial("latest", noisy(3.0), search=sign * 3.0)
    winner = trial("trial-4", noisy(3.0 + sign * change, jitter=0.1), search=sign * 2.0)
    found = verdict(winner, latest, mode=mode)
    assert found.interval is not None
    low, high = found.interval
    assert found.status == status == ("accepted" if low > 0 else "rejected" if high < 0 else "unconfirmed")


def test_a_search_that_the_latest_weights_win_is_rejected() -> None:
    latest = trial("latest", noisy(3.0), search=2.5)
    found = verdict(latest, latest)
    assert (found.status, found.gain, found.interval) == ("rejected", 0.0, None)
    assert found.sentence == (
        "Merging does not help: no candidate beats the latest weights' val_loss of 2.500 on the search half."
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (noisy(2.0, num_batches=4), noisy(3.0, num_batches=4), ", on 4 unseen batches. 4 are too few for an interval"),
        (noisy(2.0, num_batches=12), noisy(3.0, num_batches=11), ". It was measured on 12 and 11 batches"),
        (score(None, value=2.0), score(None, value=3.0), ", on unseen batches. There are no values by batch"),
    ],
    ids=["few batches", "not the same batches", "no batch values"],
)
def test_a_gain_without_an_interval_is_unconfirmed(ours: Score, theirs: Score, why: str) -> None:
    """And the sentence says what is missing."""
    found = verdict(trial("trial-4", ours), trial("latest", theirs))
    assert (found.status, found.interval) == ("unconfirmed", None)
    assert found.gain == pytest.approx(theirs.value - ours.value)
    assert found.sentence.startswith("Unconfirmed: merging ")
    assert why in found.sentence


def test_too_few_blocks_are_called_blocks() -> None:
    """A metric that is no mean over batches has no values by batch on the search half."""
    winner, latest = (trial(n, noisy(level, num_batches=4)) for n, level in [("trial-4", 2.0), ("latest", 3.0)])
    found = verdict(winner, replace(latest, search=Score(value=3.0)))
    assert found.status == "unconfirmed"
    assert (
        ", on 4 blocks of unseen batches. val_loss is no mean over batches, and 4 blocks are too few" in found.sentence
    )


def test_the_search_half_confirms_nothing() -> None:
    """Where one batch could not be split."""
    winner, latest = (
        Scored(candidate=Candidate(name=n, coefficients_K=(1.0,)), search=noisy(level))
        for n, level in [("trial-4", 2.0), ("latest", 3.0)]
    )
    found = verdict(winner, latest)
    assert (found.status, found.interval) == ("unconfirmed", None)
    assert found.gain == pytest.approx(1.0, abs=0.1)
    assert "less, on the batches that chose it. No validation batches are left to confirm it." in found.sentence


def test_a_winner_without_a_value_on_unseen_batches_is_rejected() -> None:
    found = verdict(trial("trial-4", score([float("nan")] * 9)), trial("latest", noisy(3.0, num_batches=9)))
    assert found.status == "rejected"
    assert found.sentence == "Merging does not help: val_loss of trial-4 is not finite on unseen batches."
    found = verdict(trial("trial-4", noisy(3.0)), trial("latest", score([3.0, float("inf")] * 6)))
    assert (found.status, found.interval) == ("unconfirmed", None)
    assert ". val_loss of the latest weights is not finite on every batch" in found.sentence


def around(level: float, changes: Sequence[float]) -> Score:
    """Return a score that differs from ``level`` by exact amounts, batch by batch, twelve in all."""
    return score([level + c for c in changes] * (12 // len(changes)))


@pytest.mark.parametrize(
    ("mode", "before", "changes", "sentence"),
    [
        (
            "min",
            0.38,
            (-0.07, -0.08),
            "Merging lowers val_loss from 0.380 to 0.305, 20 % less; 95 % interval 19 to 21 %",
        ),
        ("max", 0.906, (0.004, 0.008), "Merging raises val_loss from 0.9060 to 0.9120, 0.66 % more; 95 % interval "),
        ("min", 0.38, (0.01, 0.02), "Merging does not help: trial-4 raises val_loss from 0.380 to 0.395, 3.9 % more; "),
        (
            "max",
            0.9,
            (-0.03, -0.05),
            "Merging does not help: trial-4 lowers val_loss from 0.900 to 0.860, 4.4 % less; ",
        ),
        ("min", 0.38, (-0.02, 0.016), "Unconfirmed: merging lowers val_loss from 0.3800 to 0.3780, 0.53 % less; 95 % "),
        ("max", 0.38, (-0.02, 0.016), "Unconfirmed: merging lowers val_loss from 0.3800 to 0.3780, 0.53 % less; 95 % "),
        (
            "max",
            -1.2,
            (0.3, 0.5),
            "Merging raises val_loss from -1.20 to -0.80, 0.40 more; 95 % interval 0.32 to 0.48, ",
        ),
        ("min", 0.01, (-0.3, -0.5), "Merging lowers val_loss from 0.01 to -0.39, 0.40 less; 95 % interval 0.32 to "),
    ],
)
def test_a_sentence_says_from_where_to_where(mode: str, before: float, changes: Sequence[float], sentence: str) -> None:
    """In the words of the change itself: no gain below 0, no loss called a gain."""
    latest = trial("latest", around(before, [0.0, 0.0]))
    found = verdict(trial("trial-4", around(before, changes)), latest, mode=mode)
    assert found.sentence.startswith(sentence)
    assert ", on 12 unseen batches." in found.sentence
    assert "over" not in found.sentence


def test_an_interval_with_zero_inside_says_what_would_decide() -> None:
    found = verdict(trial("a", around(0.38, (-0.02, 0.016))), trial("latest", around(0.38, (0.0,))))
    assert found.interval is not None
    # An interval of 12 batches is wider, by its t quantile and by the skewness that it allows for.
    needed = 12 * ((found.gain - found.interval[0]) / found.gain) ** 2
    said = re.search(
        r"0\.53 % less; 95 % interval .* % more to .* % less, on 12 unseen .* About (\d+) such", found.sentence
    )
    assert said is not None
    assert 0.4 * needed < float(said[1]) < needed
    times = int(said[1]) // 12
    more = [score([0.38 + c for c in changes] * 6 * times) for changes in ((-0.02, 0.016), (0.0, 0.0))]
    low, _ = paired_gain(trial("a", more[0]), trial("b", more[1]), 1)[1] or (0.0, 0.0)
    assert abs(low) < 0.1 * found.gain
    nothing = verdict(trial("a", around(0.38, (-0.02, 0.02))), trial("latest", around(0.38, (0.0,))))
    assert nothing.sentence.endswith("would take over 100 times as much validation data.")


@pytest.mark.parametrize("anchor", [0.1289, 0.12795, 0.2, 0.128001])
def test_a_sentence_has_one_precision_that_tells_its_values_apart(anchor: float) -> None:
    """Goes red for "from 0.46 to 0.13 ... The best anchor scores 0.1289", in which the winner looks worse."""
    latest, winner = trial("latest", around(0.4622, (0.0,))), trial("trial-4", around(0.128, (0.0,)))
    sentence = verdict(winner, latest, trial("ema-9", around(anchor, (0.0,)))).sentence
    told = re.findall(r"(?:from|to|scores) (0\.\d+)", sentence)
    assert len(told) == 3
    assert len({len(number) for number in told}) == 1
    before, after, other = map(float, told)
    assert (after < other, after > other) == (anchor > 0.128, anchor < 0.128)
    assert after < other < before or other < after < before
    assert max(map(len, told)) <= len("0.123456")


def test_the_best_anchor_is_told_where_another_merge_won() -> None:
    latest, anchor, winner = (trial(n, noisy(v)) for n, v in [("latest", 3.0), ("ema-9", 2.6), ("trial-4", 2.5)])
    assert anchor.confirm is not None
    assert verdict(winner, latest, anchor).sentence.endswith(
        f" The best anchor, ema-9, scores {anchor.confirm.value:.2f}."
    )
    assert "anchor" not in verdict(winner, latest, latest).sentence


def test_warnings_are_kept() -> None:
    latest = trial("latest", noisy(3.0))
    assert reach_verdict(latest, latest, latest, objectives=[Objective("a", "min")], warnings=("b",)).warnings == ("b",)


OTHERS = (Objective("val_acc", "max"),)


def both(name: str, loss: Score, accuracy: Score) -> Scored:
    return trial(name, replace(loss, others=(accuracy,)))


def verdict_of_both(winner: Scored, latest: Scored) -> Verdict:
    return reach_verdict(
        winner,
        latest,
        latest,
        objectives=[Objective("val_loss", "min"), *OTHERS],
        front=[winner],
        progress=FALLING,
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
    assert re.match(r"Merging lowers val_loss from .* less \(.* %\) and (raises|lowers) val_acc from ", found.sentence)
    assert ", 95 % intervals for all together, on 12 unseen batches. About" in found.sentence
    assert found.sentence.endswith("would gain the first. The merge is trial-4, of a Pareto front of 1.")


def test_a_gain_in_another_metric_than_the_first_is_worth_no_steps() -> None:
    latest = both("latest", noisy(3.0), noisy(0.5, seed=1))
    found = verdict_of_both(both("trial-4", noisy(3.0, seed=3), noisy(0.9)), latest)
    assert (found.status, found.equivalent_steps) == ("accepted", None)


@pytest.mark.parametrize(
    ("loss", "accuracy", "status"),
    [
        (noisy(2.5), noisy(0.4), "rejected"),  # a certain loss
        (noisy(3.0, seed=3), noisy(0.5, seed=2), "unconfirmed"),  # nothing certain
        (noisy(2.5), score([float("nan")] * 12), "rejected"),
        (noisy(2.5), score(None, value=0.9), "unconfirmed"),
    ],
)
def test_of_several_metrics_nothing_less_is_accepted(loss: Score, accuracy: Score, status: str) -> None:
    found = verdict_of_both(both("trial-4", loss, accuracy), both("latest", noisy(3.0), noisy(0.5, seed=1)))
    assert (found.status, found.equivalent_steps) == (status, None)
    if accuracy.values_B is None:
        assert "There are no values by batch for an interval. Log val_acc on every validation batch." in found.sentence


def test_the_intervals_of_several_metrics_hold_together() -> None:
    """Goes red with one interval's 95 % for each of five: 77 % of draws hold all."""
    rng, held = random.Random(0), 0
    others = tuple(Objective(f"m{i}", "min") for i in range(4))
    for _ in range(NUM_DRAWS):
        ours, theirs = ([score([rng.gauss(0, 1) for _ in range(12)]) for _ in range(5)] for _ in range(2))
        winner, latest = (
            trial(n, replace(s[0], others=tuple(s[1:]))) for n, s in (("trial-0", ours), ("latest", theirs))
        )
        found = reach_verdict(winner, latest, latest, objectives=[Objective("m", "min"), *others])
        intervals = [found.interval, *(g.interval for g in found.others)]
        held += all(i is not None and i[0] <= 0 <= i[1] for i in intervals)
    assert held / NUM_DRAWS > 0.9
