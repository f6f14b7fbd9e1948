"""The place of a snapshot in the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The steps that one snapshot stands for, ``first_step`` to ``last_step``, both included.

    Args:
        kind: ``mean``: the weights averaged over the segment. ``point``: the weights at ``last_step``, which stand
            for the steps since the point before.
        first_step: First optimizer step, counted from 1.
        last_step: Last optimizer step; at least ``first_step``.
        num_updates: Weight states that the mean averages; 1 for a point.
        covered: Another snapshot already stands for these steps, as the newest mean does for the latest weights.
    """

    kind: Literal["mean", "point"]
    first_step: int
    last_step: int
    num_updates: int = 1
    covered: bool = False

    def __post_init__(self) -> None:
        assert self.first_step <= self.last_step, f"{self.first_step} > {self.last_step}"

    @property
    def num_steps(self) -> int:
        """Steps that count for this snapshot: none where another one covers them, so that no step counts twice."""
        return 0 if self.covered else self.last_step - self.first_step + 1
