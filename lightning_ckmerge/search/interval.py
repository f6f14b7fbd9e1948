"""The 95 % interval of a gain, from paired differences by batch.

Differences may be skewed: a merge gains a little on most batches, and loses much on a few. Student's t interval, which
takes no notice, then accepts up to one in six merges that gain nothing. So the interval is bent by the most adverse
skewness that its differences allow for. ``benchmarks.coverage`` measures how often it errs; docs/verdict.md tells it.

Letters: B batches, or blocks of batches.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.racing import paired_difference

CONFIDENCE = 0.95
# With fewer paired differences the t quantile alone (2.8 at 4 degrees of freedom) makes an interval worthless.
MIN_CONFIRM_BATCHES = 5
# The warning where there is no confirmation half.
ONE_BATCH = "One validation batch cannot be split: nothing could be confirmed. Use more or smaller batches."
# A sample hides its tail, and so its skewness: it is stretched by the first, and moved by so many standard errors.
SKEWNESS_FACTOR = 1.5
SKEWNESS_ERRORS = 1.0
MAX_CORRELATION = 0.9
# Times as many batches: beyond it, a difference is as good as none.
MOST_TIMES = 100


def score_gain(
    ours: Score, theirs: Score, sign: int, *, num_intervals: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``ours`` is than ``theirs`` on one half of the batches, and the 95 % interval.

    There is no interval without values by batch, with too few of them, or where one is not finite.

    Source:
        Of several intervals each holds more, by Bonferroni's inequality: Dunn 1961, *JASA* 56, 52-64.
    """
    if not _comparable(ours, theirs):
        return sign * (theirs.value - ours.value), None
    assert ours.values_B is not None
    assert theirs.values_B is not None
    assert theirs.sizes_B is not None
    mean, standard_error = paired_difference(theirs.values_B, ours.values_B, theirs.sizes_B)
    if not math.isfinite(standard_error):
        return sign * mean, None
    gain = sign * mean
    d_B = [sign * (t - o) for t, o in zip(theirs.values_B, ours.values_B, strict=True)]
    return gain, gain_interval(
        gain,
        standard_error,
        [w * (d - gain) for w, d in zip(theirs.sizes_B, d_B, strict=True)],
        tail=(1 - CONFIDENCE) / (2 * num_intervals),
    )


def gain_interval(
    gain: float, standard_error: float, residuals_B: Sequence[float], *, tail: float
) -> tuple[float, float]:
    """Return the ends of a gain's interval.

    Args:
        gain: Mean paired difference.
        standard_error: Its own, of independent batches.
        residuals_B: Differences from the mean, in the order of the batches, weighted as in the mean.
        tail: Probability on either side.
    """
    num_batches = len(residuals_B)
    standard_error *= math.sqrt(serial_inflation(residuals_B))
    quantile = float(stdtrit(num_batches - 1, 1 - tail))
    skewness = SKEWNESS_FACTOR * _skewness(residuals_B)
    error = SKEWNESS_ERRORS * math.sqrt(6 / num_batches)
    below = bent_quantile(quantile, min(0.0, skewness - error), num_batches)
    above = bent_quantile(quantile, min(0.0, -skewness - error), num_batches)
    return gain - below * standard_error, gain + above * standard_error


def bent_quantile(quantile: float, skewness: float, num_batches: int) -> float:
    """Return the quantile of a studentized mean of skewed draws, from Student's; at least that.

    >>> round(bent_quantile(2.0, -2.0, 16), 2), bent_quantile(2.0, 0.0, 16)
    (8.08, 2.0)

    Args:
        quantile: Student's.
        skewness: That of the draws, at most 0: a long tail on the side that counts against the mean.
        num_batches: Draws.

    Source:
        Hall 1992, *On the removal of skewness by transformation*, JRSS B 54, 221-228: the inverse of his cubic.
    """
    root = math.sqrt(num_batches)
    # Beyond it, where `inner` is -1/8, his correction would become smaller again.
    skewness = max(skewness, 3 * root * (quantile - math.sqrt(quantile**2 + 3 / 4)))
    if skewness == 0:
        return quantile
    inner = 1 + skewness * (quantile / root - skewness / (6 * num_batches))
    return max(quantile, 3 * root / skewness * (math.copysign(abs(inner) ** (1 / 3), inner) - 1))


def batches_needed(num_batches: int, gain: float, interval: Sequence[float]) -> int | None:
    """Return about how many batches would tell a gain from none at this spread, to two digits.

    >>> batches_needed(64, 0.001, (-0.001, 0.003)), batches_needed(64, 1e-9, (-0.001, 0.003))
    (240, None)

    Args:
        num_batches: Batches that the interval rests on.
        gain: The gain measured on them.
        interval: Its ends, on either side of 0.

    Returns:
        ``None`` where more than a hundred times as many would be needed.
    """
    margin = gain - interval[0] if gain > 0 else interval[1] - gain
    spread = margin * math.sqrt(num_batches) / _usual_quantile(num_batches)

    def tells(n: int) -> bool:
        return spread * _usual_quantile(n) < abs(gain) * math.sqrt(n)

    counts = range(num_batches, MOST_TIMES * num_batches + 1)
    place = bisect_left(counts, True, key=tells)
    return int(float(f"{counts[place]:.2g}")) if place < len(counts) else None


def serial_inflation(residuals_B: Sequence[float]) -> float:
    """Return the factor, at least 1, by which batches like their neighbours raise the variance of their mean.

    Batches cut from one document are no independent draws, and an interval that takes them for such is too narrow.

    Args:
        residuals_B: Differences from the mean, in the order of the batches.

    Source:
        The larger of two: Newey and West 1987, with ``B ** (1/3)`` lags; and a first-order autoregression's, whose
        estimated correlation is too low by ``1 / B`` or more: Kendall 1954. Below 1 it is noise or
        good luck, which counts as 1.
    """
    num_batches = len(residuals_B)
    # No overflow where squares would.
    largest = max(map(abs, residuals_B))
    if largest == 0:
        return 1.0
    r_B = [r / largest for r in residuals_B]
    variance = math.fsum(r * r for r in r_B)

    def correlation(lag: int) -> float:
        return math.fsum(a * b for a, b in zip(r_B, r_B[lag:], strict=False)) / variance

    num_lags = int(num_batches ** (1 / 3))
    newey_west = 1 + 2 * math.fsum((1 - lag / (num_lags + 1)) * correlation(lag) for lag in range(1, num_lags + 1))
    rho = min(correlation(1) + 1 / num_batches, MAX_CORRELATION)
    return max(1.0, newey_west, (1 + rho) / (1 - rho))


def _usual_quantile(num_batches: int) -> float:
    """The quantile of draws that show no skewness."""
    student = float(stdtrit(num_batches - 1, (1 + CONFIDENCE) / 2))
    return bent_quantile(student, -SKEWNESS_ERRORS * math.sqrt(6 / num_batches), num_batches)


def _skewness(residuals_B: Sequence[float]) -> float:
    largest = max(map(abs, residuals_B))
    if largest == 0:
        return 0.0
    r_B = [r / largest for r in residuals_B]
    variance = math.fsum(r * r for r in r_B) / len(r_B)
    return math.fsum(r * r * r for r in r_B) / len(r_B) / variance / math.sqrt(variance)


def _comparable(ours: Score, theirs: Score) -> bool:
    if ours.values_B is None or theirs.values_B is None:
        return False
    return len(ours.values_B) == len(theirs.values_B) >= MIN_CONFIRM_BATCHES
