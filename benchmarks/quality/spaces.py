"""Two other coordinates for the simplex, to compare with the package's: numbers in [0, 1] over their sum.

Letters: K snapshots, oldest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Coordinates, Interval, Space, normalised


class StickBreaking(Space):
    """Each snapshot, from the newest on, takes a share of what is left; the oldest takes the rest."""

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``v0``, the newest's, to ``vK-2``."""
        return {f"v{i}": Interval(low=0.0, high=1.0) for i in range(len(segments_K) - 1)}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the shares, oldest first."""
        left, newest_first = 1.0, []
        for i in range(len(segments_K) - 1):
            newest_first.append(left * z_D[f"v{i}"])
            left *= 1 - z_D[f"v{i}"]
        return normalised([left, *reversed(newest_first)])

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the shares of what was left; ``None`` outside the simplex."""
        if min(c_K) < 0:
            return None
        z_D, left = {}, 1.0
        for i, c in enumerate(reversed(c_K[1:])):
            z_D[f"v{i}"] = min(1.0, c / left) if left > 0 else 0.0
            left = max(0.0, left - c)
        return z_D


class Softmax(Space):
    """The softmax of K logits, which reaches no coefficient of 0."""

    max_logit = 3.0

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``x0`` to ``xK-1``, oldest first."""
        return {f"x{k}": Interval(low=-self.max_logit, high=self.max_logit) for k in range(len(segments_K))}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return ``exp(x)`` over its sum."""
        return normalised([math.exp(z_D[f"x{k}"]) for k in range(len(segments_K))])

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return logits around 0; ``None`` where coefficients lie too far apart."""
        if min(c_K) <= 0 or math.log(max(c_K) / min(c_K)) > 2 * self.max_logit:
            return None
        middle = (math.log(max(c_K)) + math.log(min(c_K))) / 2
        return {f"x{k}": math.log(c) - middle for k, c in enumerate(c_K)}
