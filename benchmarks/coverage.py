"""How often the verdict errs: merges that gain nothing, and are accepted or rejected; and gains that are found.

python -m benchmarks.coverage    (prints the tables of docs/verdict.md)

Letters: M draws of B paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.search import interval
from lightning_ckmerge.search.verdict import CONFIDENCE

NUM_DRAWS = 20_000
# Of each cell, against the verdict's own function.
NUM_CHECKED = 10
NUM_BATCHES = (interval.MIN_CONFIRM_BATCHES, 8, 12, 16, 32, 64, 128)
# True gains of the second table, in standard errors of the mean.
GAINS = (2, 3, 4, 6)
BURN_IN = 50

Rng = np.random.Generator
Array = np.ndarray
Draw = Callable[[Rng, int, int], Array]


def autocorrelated(rho: float) -> Draw:
    """Draws that resemble their neighbours: batches cut from one document."""

    def draw(rng: Rng, m: int, b: int) -> Array:
        e_MB = rng.normal(size=(m, BURN_IN + b))
        for i in range(1, BURN_IN + b):
            e_MB[:, i] += rho * e_MB[:, i - 1]
        return e_MB[:, BURN_IN:]

    return draw


def rare(probability: float, loss: float) -> Draw:
    """Draws of which a few lose much: ``loss`` standard deviations of the others."""

    def draw(rng: Rng, m: int, b: int) -> Array:
        is_rare_MB = rng.random((m, b)) < probability
        drawn: Array = rng.normal(size=(m, b)) - loss * (is_rare_MB - probability)
        return drawn

    return draw


# Gains of mean 0 and, where they are skewed, a long tail of losses, which is the dangerous side for `accepted`. The
# other side is the mirror image: their share of `rejected`.
DRAWS: dict[str, Draw] = {
    "normal": lambda rng, m, b: rng.normal(size=(m, b)),
    "t, 3 degrees of freedom": lambda rng, m, b: rng.standard_t(3, size=(m, b)),
    "exponential": lambda rng, m, b: 1 - rng.exponential(size=(m, b)),
    "log-normal, sigma 1": lambda rng, m, b: np.exp(0.5) - rng.lognormal(size=(m, b)),
    "one batch in 10 loses 5 sd": rare(0.1, 5.0),
    "one batch in 20 loses 10 sd": rare(0.05, 10.0),
    "autocorrelated, 0.3": autocorrelated(0.3),
    "autocorrelated, 0.6": autocorrelated(0.6),
}
# Tails so heavy, or losses so rare, that few samples show them.
SKEWED: dict[str, Draw] = {
    "log-normal, sigma 1.5": lambda rng, m, b: np.exp(1.5**2 / 2) - rng.lognormal(0, 1.5, size=(m, b)),
    "log-normal, sigma 2": lambda rng, m, b: np.exp(2.0) - rng.lognormal(0, 2.0, size=(m, b)),
    "one batch in 20 loses 100 sd": rare(0.05, 100.0),
    "one batch in 50 loses 200 sd": rare(0.02, 200.0),
}
UNEQUAL = "exponential, batches of 1 to 8 samples"


def main() -> None:
    """Print the tables."""
    rng = np.random.default_rng(0)
    cases = [*((name, draw, False) for name, draw in DRAWS.items()), (UNEQUAL, DRAWS["exponential"], True)]
    print("| differences, without a gain |", " | ".join(f"{b} batches" for b in NUM_BATCHES), "|")
    print("|---|" + "---|" * len(NUM_BATCHES))
    for name, draw, unequal in cases:
        cells = [errors(rng, draw, b, unequal=unequal) for b in NUM_BATCHES]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    print("\n| accepted of a true gain of |", " | ".join(f"{b} batches" for b in NUM_BATCHES), "|")
    print("|---|" + "---|" * len(NUM_BATCHES))
    for gain in GAINS:
        print(f"| {gain} standard errors |", " | ".join(power(rng, gain, b) for b in NUM_BATCHES), "|", flush=True)
    rng = np.random.default_rng(1)
    print("\n| strongly skewed, without a gain |", " | ".join(f"{b} batches" for b in NUM_BATCHES), "|")
    print("|---|" + "---|" * len(NUM_BATCHES))
    for name, draw in SKEWED.items():
        cells = [errors(rng, draw, b, unequal=False) for b in NUM_BATCHES]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def errors(rng: Rng, draw: Draw, b: int, *, unequal: bool) -> str:
    """Return the shares accepted and rejected without a gain, and the share that Student's interval accepts."""
    d_MB = draw(rng, NUM_DRAWS, b)
    sizes_MB = rng.integers(1, 9, size=d_MB.shape) if unequal else np.ones(d_MB.shape)
    lows, highs = intervals(d_MB / np.sqrt(sizes_MB), sizes_MB)
    return f"{percent(lows > 0)} / {percent(highs < 0)} ({percent(student_accepts(d_MB))})"


def power(rng: Rng, gain: float, b: int) -> str:
    """Return the share of a true gain that is accepted, and Student's."""
    d_MB = rng.normal(gain / b**0.5, size=(NUM_DRAWS, b))
    lows, _ = intervals(d_MB, np.ones(d_MB.shape))
    return f"{100 * (lows > 0).mean():.0f} ({100 * student_accepts(d_MB).mean():.0f})"


def intervals(d_MB: Array, sizes_MB: Array) -> tuple[Array, Array]:
    """Return the ends of the verdict's intervals, of all draws at once; of the first ones, checked."""
    num_batches = d_MB.shape[1]
    total_M = sizes_MB.sum(1)
    mean_M = (sizes_MB * d_MB).sum(1) / total_M
    r_MB = sizes_MB * (d_MB - mean_M[:, None])
    variance_M = (r_MB**2).sum(1)
    skewness_M = interval.SKEWNESS_FACTOR * (r_MB**3).mean(1) / (variance_M / num_batches) ** 1.5
    error_M = np.sqrt(variance_M * num_batches / (num_batches - 1) * inflations(r_MB, variance_M)) / total_M
    allowed = interval.SKEWNESS_ERRORS * (6 / num_batches) ** 0.5
    low_M = mean_M - bent(np.minimum(0, skewness_M - allowed), num_batches) * error_M
    high_M = mean_M + bent(np.minimum(0, -skewness_M - allowed), num_batches) * error_M
    for m in range(NUM_CHECKED):
        checked = of_verdict(d_MB[m].tolist(), sizes_MB[m].tolist())
        np.testing.assert_allclose((low_M[m], high_M[m]), checked, rtol=1e-5, atol=1e-5)
    return low_M, high_M


def inflations(r_MB: Array, variance_M: Array) -> Array:
    """Return ``serial_inflation`` of all draws."""
    num_batches = r_MB.shape[1]
    lags = range(1, int(num_batches ** (1 / 3)) + 1)
    of_lag = {lag: (r_MB[:, lag:] * r_MB[:, :-lag]).sum(1) / variance_M for lag in lags}
    newey_west_M = 1 + 2 * sum((1 - lag / (len(lags) + 1)) * of_lag[lag] for lag in lags)
    rho_M = np.minimum(of_lag[1] + 1 / num_batches, interval.MAX_CORRELATION)
    found: Array = np.maximum(np.maximum(1, newey_west_M), (1 + rho_M) / (1 - rho_M))
    return found


def bent(skewness_M: Array, num_batches: int) -> Array:
    """Return ``bent_quantile`` of all draws."""
    quantile, root = stdtrit(num_batches - 1, (1 + CONFIDENCE) / 2), num_batches**0.5
    # 0 bends nothing, and neither does next to it.
    skewness_M = np.maximum(np.minimum(skewness_M, -1e-6), 3 * root * (quantile - (quantile**2 + 3 / 4) ** 0.5))
    inner_M = 1 + skewness_M * (quantile / root - skewness_M / (6 * num_batches))
    found: Array = np.maximum(quantile, 3 * root / skewness_M * (np.cbrt(inner_M) - 1))
    return found


def of_verdict(d_B: Sequence[float], sizes_B: Sequence[float]) -> tuple[float, float]:
    """Return the verdict's own interval of one draw of gains."""
    ours = Score(value=0.0, values_B=tuple(-d for d in d_B), sizes_B=tuple(sizes_B))
    theirs = Score(value=0.0, values_B=(0.0,) * len(d_B), sizes_B=tuple(sizes_B))
    _, found = interval.score_gain(ours, theirs, 1)
    assert found is not None
    return found


def student_accepts(d_MB: Array) -> Array:
    """Return where Student's t interval of plain means lies above 0."""
    b = d_MB.shape[1]
    accepts: Array = d_MB.mean(1) > stdtrit(b - 1, (1 + CONFIDENCE) / 2) * d_MB.std(1, ddof=1) / b**0.5
    return accepts


def percent(is_so: Array) -> str:
    """Return a share to a tenth of a percent."""
    return f"{100 * is_so.mean():.1f}"


if __name__ == "__main__":
    main()
