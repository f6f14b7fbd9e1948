"""The results of a search: plain records, which the manifest, the report and the loggers read.

Letters: K snapshots, oldest first; B batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lightning_ckmerge.core.objectives import Mode, sign_of

# K numbers that sum to 1, for all tensors or for each group of them.
Coefficients = Sequence[float] | Mapping[str, Sequence[float]]
Status = Literal["accepted", "rejected", "unconfirmed"]


def counted(c: Coefficients) -> list[int]:
    """Return the places of the snapshots that count: their coefficient is not 0, in one of the groups at least.

    >>> counted([0.5, 0.0, 0.5]), counted({"mlp": [0.0, 0.0, 1.0], "norms": [0.5, 0.0, 0.5]})
    ([0, 2], [0, 2])
    """
    rows = c.values() if isinstance(c, Mapping) else [c]
    return [k for k, c_G in enumerate(zip(*rows, strict=True)) if any(c_G)]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One candidate's evaluation on one half of the batches.

    Args:
        value: The monitored metric, as validation would have logged it; an estimate if ``complete`` is false.
        metrics: Every metric that validation logged, ``value`` included.
        values_B: The metric on each batch (or block of batches, where it is no mean over batches); paired over
            candidates, since all see the same batches.
        sizes_B: Samples in each of these.
        num_batches: Batches that were evaluated.
        complete: False for a candidate that was dropped before its last batch.
        others: The other monitored metrics' scores, where there are several; without ``metrics`` of their own.
    """

    value: float
    metrics: dict[str, float] = field(default_factory=dict)
    values_B: tuple[float, ...] | None = None
    sizes_B: tuple[float, ...] | None = None
    num_batches: int = 0
    complete: bool = True
    others: tuple[Score, ...] = ()

    @property
    def objectives(self) -> tuple[Score, ...]:
        """The scores by all monitored metrics, this one first."""
        return (self, *self.others)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A merge to be scored.

    Args:
        name: ``latest``, ``uniform-4``, ``ema-120``, ... for an anchor; ``trial-7`` for a sampler's proposal;
            ``refined-2`` for one by gradients.
        coefficients_K: K numbers that sum to 1.
        coordinates: Its place in the searched space; ``None`` for a candidate outside it.
        by_group: Each group's own coefficients, where groups of tensors differ; ``coefficients_K`` are then their
            common centre.
    """

    name: str
    coefficients_K: tuple[float, ...]
    coordinates: dict[str, float] | None = None
    by_group: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def coefficients(self) -> Coefficients:
        """The coefficients of the merge."""
        return self.by_group or self.coefficients_K


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A scored candidate, anchor or not.

    Args:
        candidate: The scored candidate.
        search: Its score on the search half.
        confirm: Its score on the confirmation half, for those that verdicts compare: the winner, the latest weights and
            the best anchor, and the others of a Pareto front.
        feasible: Whether it holds every constraint.
    """

    candidate: Candidate
    search: Score
    confirm: Score | None = None
    feasible: bool = True


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Improvement over the latest weights in one of several monitored metrics; above 0 is better in either mode."""

    monitor: str
    mode: Mode
    value: float
    gain: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether merging gains, on data that the search did not see.

    Where several metrics are monitored, the gains below are in the first of them, and all intervals together hold 95 %.

    Args:
        status: ``accepted``: the interval of the gain over the latest weights lies above 0; of several metrics, one's
            does, and no one's lies below. ``rejected``: one lies below 0, or the latest weights won on the search half.
            ``unconfirmed``: the interval contains 0, or there was too little data for one.
        gain: Improvement over the latest weights, in the metric's unit; above 0 is better in either mode.
        interval: Its 95 % interval; ``None`` where there was too little data for one.
        num_differences: Paired differences that the interval rests on: unseen batches, or blocks of them where the
            metric is no mean over batches. Batches that ranks evaluate side by side count as one.
        best_anchor: Name of the best known merge (by the search half), the latest weights included; not of where the
            search began.
        gain_over_best_anchor: Improvement over it, in the metric's unit.
        interval_over_best_anchor: Its 95 % interval.
        equivalent_steps: Further training steps that would gain as much at the run's current slope; ``None`` where that
            is not well known, or nothing was accepted.
        others: Gains over the latest weights in the other monitored metrics.
        front: Names of the candidates that form the Pareto front on the search half; empty for one monitored metric.
        sentence: All of this for people.
        warnings: Further notes for people.
    """

    status: Status
    gain: float
    interval: tuple[float, float] | None
    num_differences: int | None = None
    best_anchor: str
    gain_over_best_anchor: float
    interval_over_best_anchor: tuple[float, float] | None
    sentence: str
    equivalent_steps: int | None = None
    others: tuple[Gain, ...] = ()
    front: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
    """A snapshot as the manifest names it.

    Args:
        sha256: Of its file; ``None`` for one that never was a file, or is several.
        files_sha256: Of each of several files: one a rank, by rank, or a checkpoint's.
    """

    kind: Literal["mean", "point"]
    first_step: int
    last_step: int
    num_updates: int
    sha256: str | None
    files_sha256: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The data that scored the candidates.

    Args:
        search_batches: Batches of each loader in the search half.
        confirm_batches: Batches of each loader in the confirmation half.
        search_samples: Samples in the search half, where the metric says so (it counts batch sizes).
        confirm_samples: Samples in the confirmation half, where the metric says so.
        fingerprint: SHA-256 that identifies batches and metric; equal if two searches are comparable.
    """

    search_batches: tuple[int, ...]
    confirm_batches: tuple[int, ...]
    search_samples: float | None
    confirm_samples: float | None
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The costs of a search.

    Args:
        seconds: By phase: ``anchors``, ``trials``, ``gradients`` where there were some, ``confirm``, ``other``.
        share_of_training: All searches so far, over the training time so far.
        num_batches: Batch evaluations spent; a gradient counts as three.
        num_batches_saved: Batch evaluations that dropping losers early avoided.
        stopped_early: Why fewer trials ran than were asked for; ``None`` if all ran.
    """

    seconds: dict[str, float]
    share_of_training: float | None
    num_batches: int
    num_batches_saved: int
    stopped_early: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """One search, whole.

    Args:
        step: Optimizer steps taken when it ran.
        space: Name of the searched space.
        snapshots_K: The merged snapshots, oldest first; the last is the latest weights.
        group_of: Tensor name -> group, where coefficients differ between groups.
        winner: The best of anchors and trials on the search half, among those that hold the constraints.
        anchors: In the order in which they were scored; the first is ``latest``.
        trials: The sampler's proposals in the same order, and the candidates of a refinement by gradients.
        front: Where several metrics are monitored, other merges of the Pareto front, each with its own verdict; the
            winner is the front's knee.
    """

    step: int
    monitor: str
    mode: Mode
    space: str
    snapshots_K: tuple[SnapshotRecord, ...]
    winner: Scored
    anchors: tuple[Scored, ...]
    trials: tuple[Scored, ...]
    verdict: Verdict
    evaluation: EvaluationRecord
    cost: Cost
    group_of: Mapping[str, str] = field(default_factory=dict)
    front: tuple[tuple[Scored, Verdict], ...] = ()

    @property
    def best_coordinates(self) -> dict[str, float] | None:
        """The winner's coordinates; where it has none, those of the best candidate that has some."""
        if self.winner.candidate.coordinates:
            return self.winner.candidate.coordinates
        sign = sign_of(self.mode)
        placed = [t for t in (*self.anchors, *self.trials) if t.candidate.coordinates and t.feasible]
        finite = [t for t in placed if math.isfinite(t.search.value)]
        return min(finite, key=lambda t: sign * t.search.value).candidate.coordinates if finite else None

    def members(self) -> list[SearchOutcome]:
        """Return this search once for each other merge of the front, as its winner."""
        return [replace(self, winner=member, verdict=verdict, front=()) for member, verdict in self.front]
