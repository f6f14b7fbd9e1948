"""The latest weights, moved some way towards an average of the last steps: for runs whose learning rate has decayed.

Letters: K snapshots, oldest first; the last is the latest weights. D coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space, near
from lightning_ckmerge.core.spaces.kernels import KernelName, exponential_kernel

# The first candidate: `lam`, and `tau` as a share of the window's steps.
START_LAM, START_SHARE = 0.5, 0.03
# The longest average, as a share of the window's steps: what lies further back was made by a higher learning rate.
MAX_SHARE = 0.1


class Tail(Space):
    """``(1 - lam) latest + lam EMA``, the EMA being ``tau`` steps long, at most a tenth of the buffer's.

    Source:
        The tail EMA of the NanoGPT speed runs, github.com/KellerJordan/modded-nanogpt: ``lam`` 0.6 and 150 of 2,750
        steps; in its issue 364, ``lam`` of 0.25 to 0.3 is best, in a broad optimum.
    """

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``lam`` and ``tau`` (steps)."""
        num_steps_K = [s.num_steps for s in segments_K if s.num_steps]
        low = max(1.0, num_steps_K[-1] / 2)
        return {
            "lam": Interval(low=0.0, high=1.0),
            "tau": Interval(low=low, high=max(2 * low, MAX_SHARE * sum(num_steps_K)), log=True),
        }

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the EMA's, moved towards the latest weights."""
        c_K = [z_D["lam"] * share for share in exponential_kernel(segments_K, z_D["tau"])]
        return (*c_K[:-1], c_K[-1] + 1 - z_D["lam"])

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return half of a short average."""
        tau = self.coordinates(segments_K)["tau"]
        start = START_SHARE * sum(s.num_steps for s in segments_K)
        return [{"lam": START_LAM, "tau": min(max(start, tau.low), tau.high)}]

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the place of the latest weights; others are not known."""
        if c_K[-1] != 1:
            return None
        return {"lam": 0.0, "tau": self.initial(segments_K)[0]["tau"]}

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the place of an exponential kernel, if ``tau`` is in range."""
        interval = self.coordinates(segments_K)["tau"]
        if name != "exponential" or not interval.low <= tau <= interval.high:
            return None
        return {"lam": 1.0, "tau": tau}

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Say when a longer average might gain more."""
        interval = self.coordinates(segments_K)["tau"]
        if near(z_D["tau"], interval.high, interval) and z_D["lam"]:
            return [f"The best `tau` lies on its upper bound, {z_D['tau']:.4g}. Another `search.space` may gain more."]
        return []
