"""Free coefficients, one a snapshot.

Letters: K snapshots, oldest first; D = K coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckmerge.checks import checked, require_positive
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space
from lightning_ckmerge.core.spaces.kernels import normalised


class Simplex(Space):
    """Any convex combination of the snapshots: K numbers in [0, 1], over their sum.

    Source:
        Averages of many checkpoints with searched coefficients: Wortsman et al. 2022, arXiv:2203.05482, appendix I.
    """

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``w0`` to ``wK-1``, oldest first."""
        return {f"w{k}": Interval(low=0.0, high=1.0) for k in range(len(segments_K))}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the coordinates over their sum; equal ones where all are 0."""
        w_K = [z_D[f"w{k}"] for k in range(len(segments_K))]
        largest = max(w_K)
        return normalised([w / largest for w in w_K] if largest else [1.0] * len(w_K))

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the coordinates whose largest is 1; ``None`` outside the simplex."""
        if min(c_K) < 0:
            return None
        return {f"w{k}": c / max(c_K) for k, c in enumerate(c_K)}


class Affine(Space):
    """Any combination near the mean over all steps, negative coefficients included.

    ``c_K`` is that mean's coefficients plus K deviations, less their mean: linear, so that a loss that is nearly
    quadratic in the coefficients is so in the coordinates.

    Args:
        max_deviation: Largest absolute deviation; above 0.
    """

    @checked()
    def __init__(self, *, max_deviation: float = 0.5) -> None:
        require_positive("max_deviation", max_deviation, "The default is 0.5.")
        self.max_deviation = max_deviation

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``d0`` to ``dK-1``, oldest first."""
        return {f"d{k}": Interval(low=-self.max_deviation, high=self.max_deviation) for k in range(len(segments_K))}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the mean's coefficients, moved."""
        d_K = [z_D[f"d{k}"] for k in range(len(segments_K))]
        mean = sum(d_K) / len(d_K)
        return tuple(u + d - mean for u, d in zip(_uniform(segments_K), d_K, strict=True))

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the deviations, which then sum to 0; ``None`` if one is too large."""
        d_K = [c - u for c, u in zip(c_K, _uniform(segments_K), strict=True)]
        if max(map(abs, d_K)) > self.max_deviation:
            return None
        return {f"d{k}": d for k, d in enumerate(d_K)}


def _uniform(segments_K: Sequence[Segment]) -> tuple[float, ...]:
    return normalised([s.num_steps for s in segments_K])
