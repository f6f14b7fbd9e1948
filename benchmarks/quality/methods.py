"""What is compared, by name. A line here is a row of docs/quality.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.terminator import BestValueStagnationEvaluator, Terminator

from benchmarks.quality import baselines
from benchmarks.quality.case import Case, Found, search
from benchmarks.quality.spaces import Softmax, StickBreaking
from lightning_ckmerge.config import AnchorName
from lightning_ckmerge.core.spaces import Affine, Auto, Decay, Grouped, Pairwise, Simplex, Space, Window
from lightning_ckmerge.search.hedge import GPHedgeSampler
from lightning_ckmerge.search.stopping import NEVER, Stopping

# As many coordinates as snapshots: 16 trials would hardly leave the anchors.
NUM_FREE_TRIALS = 32


@dataclass(frozen=True)
class Method:
    """A way of merging.

    Args:
        find: Does it.
        source: What it is, and where it comes from.
    """

    find: Callable[[Case], Found]
    source: str


def known(anchor: AnchorName, snapshots: str = "buffer") -> Callable[[Case], Found]:
    """The best of the package's anchors of this name, over the buffer or other snapshots of the case."""
    return lambda case: search(case, Window(), snapshots=getattr(case, snapshots), anchors=[anchor], n_trials=0)


def searched(space: Space, **options: Any) -> Callable[[Case], Found]:
    """One search of the buffer, the default anchors first."""
    return lambda case: search(case, space, **options)


def pair(case: Case) -> Found:
    """The paper's method: one number, its two ends first, and a portfolio of acquisition functions."""
    return search(case, Pairwise(), snapshots=case.pair, anchors=(), sampler=GPHedgeSampler(seed=0))


def stagnating(case: Case) -> Found:
    """The default, ended by one of Optuna's terminators."""
    with warnings.catch_warnings():
        # Optuna 5.0 calls evaluators experimental, and all terminators deprecated.
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        terminator = Terminator(BestValueStagnationEvaluator(max_stagnation_trials=5), min_n_trials=1)
    return search(case, Grouped(), stopping=Stopping(terminator=terminator))


DEFAULT = "grouped"
CONTROL = "decay, after a decay"
METHODS = {
    DEFAULT: Method(
        searched(Grouped()),
        "the default: `decay`, its length longer for embeddings and attention and shorter for MLPs, by factors that "
        "`benchmarks.quality.factors` read off cpp-0, cpp-1 and python-0: the other three runs had no part in them; "
        "the search begins at a place that cpp-0 and python-0 told",
    ),
    "grouped, all trials": Method(searched(Grouped(), stopping=NEVER), "the default, but for its early end"),
    "grouped, nothing dropped": Method(
        searched(Grouped(), stopping=NEVER, staged=False),
        "all trials, on all batches: what the default should equal",
    ),
    "grouped, stagnation": Method(
        stagnating, "ended by Optuna's terminator, after five trials in a row without a better one"
    ),
    "grouped, power kernel": Method(searched(Grouped(space=Decay(kernel="power"))), "the same factors"),
    "grouped, lengths searched": Method(
        searched(Grouped(max_deviation=0.2)), "the same factors, and around them a coordinate a kind"
    ),
    "grouped, refined by gradients": Method(
        searched(Grouped(), refined=True),
        "`search.refine`: from the default's winner a step downhill, over a coefficient a snapshot and tensor; its "
        "gradient counts as three evaluations",
    ),
    "auto": Method(
        searched(Auto()), "`tau`, `beta`, kernel, window, pooling and whether kinds differ, all in one study"
    ),
    "auto, 32 trials": Method(searched(Auto(), n_trials=NUM_FREE_TRIALS), "as many as free coefficients have"),
    "decay": Method(searched(Decay()), "an EMA's length and a step past it, the same for all tensors"),
    "decay, power kernel": Method(searched(Decay(kernel="power")), "the kernel of post-hoc EMA, arXiv:2312.02696"),
    "decay, minus-sqrt kernel": Method(searched(Decay(kernel="minus_sqrt")), "the kernel of WSM, arXiv:2507.17634"),
    "decay, ratio searched": Method(searched(Decay(ratio=None)), "a third coordinate"),
    "EMA length searched": Method(
        searched(Decay(max_extrapolation=0)), "`decay` without extrapolation: post-hoc EMA, arXiv:2312.02696"
    ),
    "window": Method(searched(Window()), "how many of the last snapshots, and their tilt"),
    "affine": Method(searched(Affine(), n_trials=NUM_FREE_TRIALS), "free coefficients that sum to 1"),
    "simplex": Method(
        searched(Simplex(), n_trials=NUM_FREE_TRIALS), "free coefficients of at least 0: numbers in [0, 1], normalised"
    ),
    "simplex, stick-breaking": Method(
        searched(StickBreaking(), n_trials=NUM_FREE_TRIALS),
        "the simplex, its coefficients broken off what is left, the newest first",
    ),
    "simplex, softmax": Method(
        searched(Softmax(), n_trials=NUM_FREE_TRIALS), "the simplex, as the softmax of logits in [-3, 3]"
    ),
    "pair (GP-Hedge)": Method(
        pair,
        "the paper's method, arXiv:2403.19390, over two points 3 % of the run apart, which was best on a shorter run "
        "of one of the corpora",
    ),
    "SLERP": Method(
        baselines.slerp,
        "the two points of the pair, on the great circle between them (Shoemake 1985), the place searched",
    ),
    "best single": Method(known("best-single"), "each snapshot of the buffer alone"),
    "uniform soup": Method(
        known("wsm-linear"),
        "the mean over the whole buffer, arXiv:2203.05482, weighted by steps; it reaches back to the first step",
    ),
    "LAWA": Method(
        known("uniform"), "the mean over the last 2, 4, 8 or all snapshots, the best of them, arXiv:2209.14981"
    ),
    "EMA": Method(known("ema"), "the best of three lengths: 5, 12 and 30 % of the buffer's steps"),
    "WSM linear": Method(
        known("wsm-linear", "window"), "arXiv:2507.17634, over as many of the last steps as the decay branch has"
    ),
    "WSM minus-sqrt": Method(known("wsm-minus-sqrt", "window"), "as WSM linear, for a rate that falls as 1 - sqrt"),
    "greedy soup": Method(known("greedy-soup"), "arXiv:2203.05482, recipe 1"),
    "metrics-weighted": Method(
        known("metrics-weighted"),
        "after arXiv:2504.18580, whose formula could not be read: here powers 1, 10 and 100 of the ratio of losses, "
        "the best of them",
    ),
    "Fisher": Method(
        baselines.fisher,
        f"arXiv:2111.09832, the last {baselines.NUM_SNAPSHOTS} means, diagonals from {baselines.NUM_BATCHES} training "
        "batches a snapshot",
    ),
    "RegMean": Method(
        baselines.regmean,
        f"arXiv:2212.09849, the last {baselines.NUM_SNAPSHOTS} means, inner products from {baselines.NUM_BATCHES} "
        f"training batches a snapshot, times {baselines.OFF_DIAGONAL} off the diagonal",
    ),
    CONTROL: Method(
        lambda case: search(case, Decay(), snapshots=case.decayed),
        "the control: the decay branch's own trail, whose rate has fallen to 0",
    ),
}
