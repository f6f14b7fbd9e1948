"""`decay` near the latest weights: for runs whose learning rate has decayed.

Letters: K snapshots, oldest first; D coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval
from lightning_ckmerge.core.spaces.decay import Decay

# The first candidate: `tau` as a share of the window's steps, and `beta`. At the ends of six decayed runs searches of
# `decay` found 0.048 to 0.064 and 0.32 to 0.40 (benchmarks/quality/results.json, `decay, after a decay`).
START_SHARE, START_BETA = 0.055, 0.35
# What lies further back was made by a higher learning rate.
MAX_SHARE, MAX_BETA = 0.15, 1.0


class Tail(Decay):
    """`decay` with a short average and a small step past it, which leave the latest weights where they are, nearly.

    Source:
        A short average after a decay: the tail EMA of the NanoGPT speed runs, github.com/KellerJordan/modded-nanogpt,
        0.4 of the last weights and 0.6 of an EMA over 150 of 2,750 steps. The step past it is ours.
    """

    must_be_certain = True

    def __init__(self) -> None:
        super().__init__(max_extrapolation=MAX_BETA)

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``tau`` (steps), at most a part of the window, and ``beta``."""
        ranges = super().coordinates(segments_K)
        low = ranges["tau"].low
        high = max(2 * low, MAX_SHARE * sum(s.num_steps for s in segments_K))
        return {**ranges, "tau": Interval(low=low, high=high, log=True)}

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the optima of earlier runs."""
        tau = self.coordinates(segments_K)["tau"]
        start = round(START_SHARE * sum(s.num_steps for s in segments_K), 1)
        return [{"tau": min(max(start, tau.low), tau.high), "beta": START_BETA}]

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return none: its bounds keep a merge near the latest weights."""
        return []
