"""The space of a search, and how a candidate is scored.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_ckmerge.config import DEFAULT_ANCHORS, AnchorName, Constraint
from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Coefficients, Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Space

Half = Literal["search", "confirm"]
KeepGoing = Callable[[Sequence[float], Sequence[float]], bool]


class Evaluate(Protocol):
    """Scores coefficients on one half of the batches; the same batches and random numbers every time."""

    def __call__(self, c: Coefficients, half: Half, keep_going: KeepGoing | None = None) -> Score:
        """Return the score.

        Args:
            c: K coefficients, or K a group.
            half: Which batches.
            keep_going: Asked after each batch, with values and sizes so far, where the metric is a mean over batches;
                ``False`` ends the evaluation.
        """


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The space of a search, its snapshots and its score.

    Args:
        objectives: The metrics to search by, at least one; of several the Pareto front is searched.
        segments_K: K segments, oldest first; the last is the latest weights.
        previous: Coordinates of the previous search's optimum.
        n_trials: The sampler's proposals.
        anchors: Names of known merges to score first, beside the latest weights.
        max_added: Candidates that may be added to the sampler's, at most.
        staged: Whether to drop losers early, where no constraint needs all batches.
    """

    objectives: tuple[Objective, ...]
    space: Space
    segments_K: tuple[Segment, ...]
    n_trials: int
    anchors: tuple[AnchorName, ...] = DEFAULT_ANCHORS
    max_added: int = 0
    staged: bool = True
    constraints: tuple[Constraint, ...] = ()
    previous: Mapping[str, float] | None = None

    @property
    def signs(self) -> tuple[int, ...]:
        """1 for each metric of which lower values are better, -1 for the others."""
        return tuple(o.sign for o in self.objectives)

    @property
    def sign(self) -> int:
        """The first metric's: 1 if lower values are better, -1 if higher ones are."""
        return self.objectives[0].sign

    @property
    def has_several(self) -> bool:
        """Whether the search is for a Pareto front."""
        return len(self.objectives) > 1
