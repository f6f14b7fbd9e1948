"""The newest snapshots: two of them, or a window.

Letters: K snapshots, oldest first; D coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_ckmerge.checks import checked, require_positive
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space, near
from lightning_ckmerge.core.spaces.kernels import normalised
from lightning_ckmerge.errors import ConfigError


class Pairwise(Space):
    """The paper's space: ``lam theta_t + (1 - lam) theta_{t-1}`` over the last two point snapshots.

    Args:
        alpha: Lower end of ``lam``, in [0, 1). The paper's own value could not be read; at a constant learning rate
            the optimum lies near 0.5, so a narrow interval would clip it.

    Source:
        Liu et al. 2024, arXiv:2403.19390, section 3: one scalar, its end points first, then a Gaussian process.
    """

    snapshot = "point"

    @checked()
    def __init__(self, *, alpha: float = 0.0) -> None:
        if not 0 <= alpha < 1:
            raise ConfigError(f"`0 <= alpha < 1` must hold, got {alpha}. The default, 0, searches the whole pair.")
        self.alpha = alpha

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``lam``, the newer snapshot's coefficient."""
        return {"lam": Interval(low=self.alpha, high=1.0)}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return zeros but for the newest two."""
        return (0.0,) * (len(segments_K) - 2) + (1 - z_D["lam"], z_D["lam"])

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the two end points, which the paper scores first."""
        return [{"lam": self.alpha}, {"lam": 1.0}]

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Say when the interval may have cut off the optimum, or when merging does not help."""
        interval = self.coordinates(segments_K)["lam"]
        if near(z_D["lam"], interval.high, interval):
            return ["The best `lam` is 1, its upper bound: the latest weights beat every pair."]
        if near(z_D["lam"], interval.low, interval):
            return [f"The best `lam` lies on its lower bound, {interval.low:.4g}: lower `alpha` or space points wider."]
        return []


class Window(Space):
    """The last ``k`` snapshots, weighted by their steps and tilted towards new (``tilt > 0``) or old ones.

    Args:
        max_tilt: Largest absolute tilt; weights at the two ends of the window differ by ``exp(2 tilt)``.

    Source:
        ``tilt = 0`` is the moving average of LAWA, Kaddour 2022, arXiv:2209.14981. That the window's length matters
        most: WSM, arXiv:2507.17634.
    """

    @checked()
    def __init__(self, *, max_tilt: float = 3.0) -> None:
        require_positive("max_tilt", max_tilt, "The default is 3.")
        self.max_tilt = max_tilt

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``k`` (snapshots) and ``tilt``."""
        num_counted = sum(1 for s in segments_K if s.num_steps)
        return {
            "k": Interval(low=1, high=num_counted, integer=True),
            "tilt": Interval(low=-self.max_tilt, high=self.max_tilt),
        }

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return zeros outside the window."""
        indices = [i for i, s in enumerate(segments_K) if s.num_steps][-int(z_D["k"]) :]
        weights_K = [0.0] * len(segments_K)
        for position, i in enumerate(indices):
            u = 2 * position / (len(indices) - 1) - 1 if len(indices) > 1 else 0.0
            weights_K[i] = segments_K[i].num_steps * math.exp(z_D["tilt"] * u)
        return normalised(weights_K)
