"""The verdict: does the merge gain on data that the search did not see?

Letters: B batches (or blocks of batches) of the confirmation half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.config import Mode, Objective
from lightning_ckmerge.core.outcome import Gain, Score, Status, Trial, Verdict
from lightning_ckmerge.search.racing import paired_difference
from lightning_ckmerge.search.slope import CONFIDENCE, Progress

# With fewer paired differences the t quantile alone (2.8 at 4 degrees of freedom) makes an interval worthless.
MIN_CONFIRM_BATCHES = 5


def reach_verdict(
    winner: Trial,
    latest: Trial,
    best_anchor: Trial,
    *,
    monitor: str,
    mode: Mode,
    others: Sequence[Objective] = (),
    front: Sequence[Trial] = (),
    progress: Progress | None = None,
    warnings: tuple[str, ...] = (),
) -> Verdict:
    """Compare the winner with the latest weights and the best anchor, on the confirmation half.

    Picking the best of many flatters it, so the search half, on which it was picked, has no say here.

    Args:
        winner: The best candidate on the search half.
        latest: The latest weights.
        best_anchor: The best on the search half of the known merges, the latest weights included.
        monitor: The metric's name, for the sentence.
        mode: Whether lower or higher values are better.
        others: The other monitored metrics. A gain in one must be certain, and a loss in none; the intervals of all
            together hold 95 %.
        front: The Pareto front, where there are others.
        progress: The run so far, from which a gain is told in training steps.
        warnings: What else people should know.
    """
    objectives = (Objective(monitor, mode), *others)
    gains = [_gain(winner, latest, i, objectives) for i in range(len(objectives))]
    first = gains[0]
    anchor_gain, anchor_interval = paired_gain(winner, best_anchor, objectives[0].sign, num_intervals=len(objectives))
    status = _status(winner, latest, [g.interval for g in gains])
    is_certain = status == "accepted" and first.interval is not None and first.interval[0] > 0
    verdict = Verdict(
        status=status,
        gain=first.gain,
        interval=first.interval,
        best_anchor=best_anchor.candidate.name,
        gain_over_best_anchor=anchor_gain,
        interval_over_best_anchor=anchor_interval,
        equivalent_steps=progress.steps_worth(first.gain, objectives[0].sign) if progress and is_certain else None,
        others=tuple(gains[1:]),
        front=tuple(t.candidate.name for t in front),
        sentence="",
        warnings=warnings,
    )
    tell = _sentence_of_one if not others else _sentence_of_several
    return replace(verdict, sentence=tell(verdict, first, winner, latest, best_anchor))


def paired_gain(
    trial: Trial, other: Trial, sign: int, *, objective: int = 0, num_intervals: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``trial`` is than ``other`` on the confirmation half, and the 95 % interval.

    Without per-batch values, or with fewer than five batches, there is no interval. Without a confirmation half the
    gain is the search half's.

    Args:
        trial: One candidate.
        other: Another.
        sign: 1 if lower values are better, -1 if higher ones are.
        objective: By which of the monitored metrics.
        num_intervals: Of how many intervals that hold 95 % together this is one.
    """
    if trial is other:
        return 0.0, None
    if trial.confirm is None or other.confirm is None:
        ours, theirs = (t.search.objectives[objective] for t in (trial, other))
        return sign * (theirs.value - ours.value), None
    ours, theirs = (c.objectives[objective] for c in (trial.confirm, other.confirm))
    return score_gain(ours, theirs, sign, num_intervals=num_intervals)


def score_gain(
    ours: Score, theirs: Score, sign: int, *, num_intervals: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``ours`` is than ``theirs`` on one half of the batches, and the 95 % interval, if any.

    Source:
        Of several intervals each holds more, by Bonferroni's inequality: Dunn 1961, *JASA* 56, 52-64.
    """
    if not _comparable(ours, theirs):
        return sign * (theirs.value - ours.value), None
    assert ours.values_B is not None
    assert theirs.values_B is not None
    assert theirs.sizes_B is not None
    mean, standard_error = paired_difference(theirs.values_B, ours.values_B, theirs.sizes_B)
    d_B = [t - o for t, o in zip(theirs.values_B, ours.values_B, strict=True)]
    standard_error *= math.sqrt(serial_inflation([w * (d - mean) for w, d in zip(theirs.sizes_B, d_B, strict=True)]))
    tail = (1 - CONFIDENCE) / (2 * num_intervals)
    margin = float(stdtrit(len(ours.values_B) - 1, 1 - tail)) * standard_error
    return sign * mean, (sign * mean - margin, sign * mean + margin)


def serial_inflation(residuals_B: Sequence[float]) -> float:
    """Return by what factor, at least 1, batches that resemble their neighbours raise the variance of their mean.

    Batches cut from one document are no independent draws, and an interval that takes them for such is too narrow.

    Args:
        residuals_B: Differences from the mean, in the order of the batches.

    Source:
        Newey and West 1987, with ``B ** (1/3)`` lags; below 1 it is noise, or good luck that nobody should count on.
    """
    num_batches = len(residuals_B)
    variance = math.fsum(r * r for r in residuals_B)
    if not (math.isfinite(variance) and variance > 0):
        return 1.0
    num_lags = int(num_batches ** (1 / 3))
    factor = 1.0
    for lag in range(1, num_lags + 1):
        covariance = math.fsum(a * b for a, b in zip(residuals_B, residuals_B[lag:], strict=False))
        factor += 2 * (1 - lag / (num_lags + 1)) * covariance / variance
    return max(1.0, factor)


def _comparable(ours: Score, theirs: Score) -> bool:
    if ours.values_B is None or theirs.values_B is None:
        return False
    return len(ours.values_B) == len(theirs.values_B) >= MIN_CONFIRM_BATCHES


def _gain(trial: Trial, latest: Trial, index: int, objectives: Sequence[Objective]) -> Gain:
    objective = objectives[index]
    gain, interval = paired_gain(trial, latest, objective.sign, objective=index, num_intervals=len(objectives))
    value = (trial.confirm or trial.search).objectives[index].value
    return Gain(monitor=objective.monitor, mode=objective.mode, value=value, gain=gain, interval=interval)


def _status(winner: Trial, latest: Trial, intervals: Sequence[tuple[float, float] | None]) -> Status:
    known = [interval for interval in intervals if interval is not None]
    if winner is latest:
        return "rejected"
    if len(known) < len(intervals):
        return "unconfirmed"
    # What is not finite is no gain, and not known to be no loss.
    return "accepted" if any(low > 0 for low, _ in known) and all(high >= 0 for _, high in known) else "rejected"


def _sentence_of_one(verdict: Verdict, first: Gain, winner: Trial, latest: Trial, best_anchor: Trial) -> str:
    monitor, interval = first.monitor, first.interval
    if winner is latest:
        return f"Merging does not help: no candidate beats the latest weights' {monitor} on the search half."
    if interval is None:
        return (
            f"Unconfirmed: merging seems to gain {first.gain:.4g} {monitor} over the latest weights, but "
            f"{_why_no_interval(monitor, winner, latest)}"
        )
    bounds = f"95 % {interval[0]:.4g} to {interval[1]:.4g}"
    if verdict.status == "rejected":
        return (
            f"Merging does not help: on unseen batches the best candidate changes {monitor} by {first.gain:.4g} for "
            f"the better ({bounds}), which may be nothing."
        )
    gains = f"Merging gains {first.gain:.4g} {monitor} over the latest weights ({bounds}){_steps_worth(verdict)}"
    if winner is best_anchor:
        return f"{gains}, by {winner.candidate.name}."
    return f"{gains}, and {verdict.gain_over_best_anchor:.4g} over the best anchor, {best_anchor.candidate.name}."


def _sentence_of_several(verdict: Verdict, first: Gain, winner: Trial, latest: Trial, best_anchor: Trial) -> str:
    gains, name = (first, *verdict.others), winner.candidate.name
    monitors = " and ".join(g.monitor for g in gains)
    if winner is latest:
        return f"Merging does not help: no merge is a better compromise in {monitors} on the search half."
    told = ", ".join(f"{g.gain:.4g} {g.monitor}{_bounds(g)}" for g in gains)
    if verdict.status == "unconfirmed":
        index = next(i for i, g in enumerate(gains) if g.interval is None)
        why = _why_no_interval(gains[index].monitor, winner, latest, index)
        return f"Unconfirmed: merging seems to gain {told} over the latest weights, but {why}"
    if verdict.status == "rejected":
        return (
            f"Merging does not help: on unseen batches {name} gains {told} (95 % for all together); one gain would "
            "have to be certain, and no loss."
        )
    return (
        f"Merging gains {told} over the latest weights (95 % for all together){_steps_worth(verdict)}, by {name}, of a "
        f"Pareto front of {len(verdict.front)}."
    )


def _bounds(gain: Gain) -> str:
    return f" ({gain.interval[0]:.4g} to {gain.interval[1]:.4g})" if gain.interval is not None else ""


def _steps_worth(verdict: Verdict) -> str:
    if verdict.equivalent_steps is None:
        return ""
    what = "the first " if verdict.others else ""
    return f", {what}as much as about {verdict.equivalent_steps} further training steps at the current slope"


def _why_no_interval(monitor: str, winner: Trial, latest: Trial, objective: int = 0) -> str:
    if winner.confirm is None or latest.confirm is None:
        return "no validation batches are left to confirm it. Use more or smaller batches."
    ours_B, theirs_B = (c.objectives[objective].values_B for c in (winner.confirm, latest.confirm))
    if ours_B is None or theirs_B is None:
        return f"there are no values by batch for an interval. Log {monitor} on every validation batch."
    if len(ours_B) != len(theirs_B):
        return f"they were measured on {len(ours_B)} and {len(theirs_B)} batches. Log {monitor} on every one."
    too_few = f"too few for an interval (at least {MIN_CONFIRM_BATCHES} in the confirmation half"
    if latest.search.objectives[objective].values_B is None:
        return (
            f"{monitor} is no mean over batches, and its {len(ours_B)} blocks of validation batches are {too_few}, "
            "each of a batch or more on every rank). Use more or smaller batches."
        )
    return (
        f"{len(ours_B)} validation batches are {too_few}; those that ranks evaluate side by side count as one). Use "
        "more or smaller batches."
    )
