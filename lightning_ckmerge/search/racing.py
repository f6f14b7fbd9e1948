"""Drop losing candidates early, by their paired per-batch differences to the best one so far.

Letters: B batches evaluated so far; ``d_B`` paired differences, above 0 where the candidate is worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_ckmerge.core.outcome import Score

# On a small GPT the paired difference varies 17 times less from batch to batch than the loss does. docs/quality.md says
# the saving by dropping there: its column "evaluations" against the one without dropping.
MIN_BATCHES = 4
NUM_STANDARD_ERRORS = 2.0
# Late in a search many candidates differ by next to nothing, which takes many batches to tell: one must promise this
# share of the incumbent's gain over the latest weights.
MIN_PROMISE = 0.005


class Race:
    """One candidate against the incumbent, batch by batch.

    Args:
        incumbent: The best complete score so far, with per-batch values.
        sign: 1 if lower values are better, -1 if higher ones are.
        margin: By how much the candidate must promise to be better, in the metric's unit; at least 0.
    """

    def __init__(self, incumbent: Score, sign: int, margin: float = 0.0) -> None:
        assert incumbent.values_B is not None
        self._incumbent = incumbent
        self._values_B = incumbent.values_B
        self._sign = sign
        self._margin = margin

    def keep_going(self, values_B: Sequence[float], sizes_B: Sequence[float]) -> bool:
        """Whether the candidate may still win by the margin, after B batches."""
        num_batches = len(values_B)
        if not math.isfinite(values_B[-1]):
            return False
        if num_batches < MIN_BATCHES or num_batches >= len(self._values_B):
            return True
        mean, standard_error = paired_difference(values_B, self._values_B[:num_batches], sizes_B)
        return not self._sign * mean - NUM_STANDARD_ERRORS * standard_error > -self._margin

    def estimate(self, partial: Score) -> Score:
        """Return a dropped candidate's score over all batches: the incumbent's plus the mean paired difference.

        A sampler learns more from it than from the news that the candidate was pruned.
        """
        assert partial.values_B is not None
        assert partial.sizes_B is not None
        mean, _ = paired_difference(partial.values_B, self._values_B[: len(partial.values_B)], partial.sizes_B)
        return replace(partial, value=self._incumbent.value + mean, complete=False)


def paired_difference(
    values_B: Sequence[float], others_B: Sequence[float], sizes_B: Sequence[float]
) -> tuple[float, float]:
    """Return the mean of ``values_B - others_B``, weighted by ``sizes_B``, and its standard error.

    Args:
        values_B: B values of one candidate, by batch.
        others_B: B values of another on the same batches.
        sizes_B: B weights, such as the batches' numbers of samples.

    Returns:
        Both NaN if a difference is not finite.

    Source:
        Standard error of a weighted mean, ratio estimator: Cochran 1977, *Sampling Techniques*, section 6.4.
    """
    d_B = [v - o for v, o in zip(values_B, others_B, strict=True)]
    if not all(map(math.isfinite, d_B)):
        # `fsum` raises where infinities of both signs meet.
        return math.nan, math.nan
    total, num_batches = math.fsum(sizes_B), len(d_B)
    mean = math.fsum(w * d for w, d in zip(sizes_B, d_B, strict=True)) / total
    if num_batches < 2:
        return mean, math.inf
    # `hypot` does not overflow where squares would.
    root = math.hypot(*(w * (d - mean) for w, d in zip(sizes_B, d_B, strict=True)))
    return mean, root * math.sqrt(num_batches / (num_batches - 1)) / total
