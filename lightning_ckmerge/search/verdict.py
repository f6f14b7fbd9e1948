"""The verdict: does the merge gain on data that the search did not see?

Letters: B batches (or blocks of batches) of the confirmation half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.config import Mode
from lightning_ckmerge.core.outcome import Score, Status, Trial, Verdict
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
    progress: Progress | None = None,
    warnings: tuple[str, ...] = (),
) -> Verdict:
    """Compare the winner with the latest weights and the best anchor, on the confirmation half.

    Picking the best of many flatters it, so the search half, on which it was picked, has no say here.

    Args:
        winner: The best candidate on the search half.
        latest: The latest weights.
        best_anchor: The best anchor on the search half, the latest weights included.
        monitor: The metric's name, for the sentence.
        mode: Whether lower or higher values are better.
        progress: The run so far, from which a gain is told in training steps.
        warnings: What else people should know.
    """
    sign = 1 if mode == "min" else -1
    gain, interval = paired_gain(winner, latest, sign)
    anchor_gain, anchor_interval = paired_gain(winner, best_anchor, sign)
    status: Status = "rejected"
    if interval is None and winner is not latest:
        status = "unconfirmed"
    elif interval is not None and interval[0] > 0:
        status = "accepted"
    steps = progress.steps_worth(gain, sign) if progress is not None and status == "accepted" else None
    return Verdict(
        status=status,
        gain=gain,
        interval=interval,
        best_anchor=best_anchor.candidate.name,
        gain_over_best_anchor=anchor_gain,
        interval_over_best_anchor=anchor_interval,
        equivalent_steps=steps,
        sentence=_sentence(status, monitor, gain, interval, winner, latest, best_anchor, anchor_gain, steps),
        warnings=warnings,
    )


def paired_gain(trial: Trial, other: Trial, sign: int) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``trial`` is than ``other`` on the confirmation half, and the 95 % interval.

    Without per-batch values, or with fewer than five batches, there is no interval. Without a confirmation half the
    gain is the search half's.
    """
    if trial is other:
        return 0.0, None
    if trial.confirm is None or other.confirm is None:
        return sign * (other.search.value - trial.search.value), None
    return score_gain(trial.confirm, other.confirm, sign)


def score_gain(ours: Score, theirs: Score, sign: int) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``ours`` is than ``theirs`` on one half of the batches, and the 95 % interval, if any."""
    if not _comparable(ours, theirs):
        return sign * (theirs.value - ours.value), None
    assert ours.values_B is not None
    assert theirs.values_B is not None
    assert theirs.sizes_B is not None
    mean, standard_error = paired_difference(theirs.values_B, ours.values_B, theirs.sizes_B)
    d_B = [t - o for t, o in zip(theirs.values_B, ours.values_B, strict=True)]
    standard_error *= math.sqrt(serial_inflation([w * (d - mean) for w, d in zip(theirs.sizes_B, d_B, strict=True)]))
    margin = float(stdtrit(len(ours.values_B) - 1, (1 + CONFIDENCE) / 2)) * standard_error
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


def _sentence(
    status: Status,
    monitor: str,
    gain: float,
    interval: tuple[float, float] | None,
    winner: Trial,
    latest: Trial,
    best_anchor: Trial,
    anchor_gain: float,
    steps: int | None,
) -> str:
    if winner is latest:
        return f"Merging does not help: no candidate beats the latest weights' {monitor} on the search half."
    if interval is None:
        return (
            f"Unconfirmed: merging seems to gain {gain:.4g} {monitor} over the latest weights, but "
            f"{_why_no_interval(monitor, winner, latest)}"
        )
    bounds = f"95 % {interval[0]:.4g} to {interval[1]:.4g}"
    if status == "rejected":
        return (
            f"Merging does not help: on unseen batches the best candidate changes {monitor} by {gain:.4g} for the "
            f"better ({bounds}), which may be nothing."
        )
    gains = f"Merging gains {gain:.4g} {monitor} over the latest weights ({bounds})"
    if steps is not None:
        gains += f", as much as about {steps} further training steps at the current slope"
    if winner is best_anchor:
        return f"{gains}, by {winner.candidate.name}."
    return f"{gains}, and {anchor_gain:.4g} over the best anchor, {best_anchor.candidate.name}."


def _why_no_interval(monitor: str, winner: Trial, latest: Trial) -> str:
    if winner.confirm is None or latest.confirm is None:
        return "no validation batches are left to confirm it. Use more or smaller batches."
    ours_B, theirs_B = winner.confirm.values_B, latest.confirm.values_B
    if ours_B is None or theirs_B is None:
        return f"there are no values by batch for an interval. Log {monitor} on every validation batch."
    if len(ours_B) != len(theirs_B):
        return f"they were measured on {len(ours_B)} and {len(theirs_B)} batches. Log {monitor} on every one."
    too_few = f"too few for an interval (at least {MIN_CONFIRM_BATCHES} in the confirmation half"
    if latest.search.values_B is None:
        return (
            f"{monitor} is no mean over batches, and its {len(ours_B)} blocks of validation batches are {too_few}, "
            "each of a batch or more on every rank). Use more or smaller batches."
        )
    return (
        f"{len(ours_B)} validation batches are {too_few}; those that ranks evaluate side by side count as one). Use "
        "more or smaller batches."
    )
