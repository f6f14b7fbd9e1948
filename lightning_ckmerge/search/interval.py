"""The 95 % interval of a gain, from paired differences by batch.

Letters: B batches, or blocks of batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search.racing import paired_difference
from lightning_ckmerge.search.slope import CONFIDENCE

# With fewer paired differences the t quantile alone (2.8 at 4 degrees of freedom) makes an interval worthless.
MIN_CONFIRM_BATCHES = 5


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
    d_B = [t - o for t, o in zip(theirs.values_B, ours.values_B, strict=True)]
    standard_error *= math.sqrt(serial_inflation([w * (d - mean) for w, d in zip(theirs.sizes_B, d_B, strict=True)]))
    tail = (1 - CONFIDENCE) / (2 * num_intervals)
    margin = float(stdtrit(len(ours.values_B) - 1, 1 - tail)) * standard_error
    gain = sign * mean
    return gain, (gain - margin, gain + margin) if math.isfinite(margin) else None


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
