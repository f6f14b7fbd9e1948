"""Decaying kernels, and a step past them.

Letters: K snapshots, oldest first; D coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from lightning_ckmerge.checks import checked, require_at_least, require_choice
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space, near
from lightning_ckmerge.core.spaces.kernels import KernelName, kernel
from lightning_ckmerge.errors import ConfigError

# The first candidate: `tau` as a share of the window's steps, and `beta`. Chosen on two runs of a small GPT (cpp-0 and
# python-0 of docs/quality.md), where it has 99 % of the best candidate's gain.
START_SHARE, START_BETA = 0.1, 0.6
# Best on four other runs of small GPTs, broad between 0.1 and 0.25 (`python -m benchmarks.quality.latest_share`).
LATEST_SHARE = 1 / 6


class Decay(Space):
    """A decaying kernel over the steps of the run, plus a step past it.

    ``c_K = k(tau) + beta (h - k(ratio tau))`` with ``h = (1 - latest_share) k(tau) + latest_share l``, where
    ``k(tau)_K`` is the kernel summed over each snapshot's steps, and ``l_K`` is 1 for the latest weights alone. Of the
    exponential kernel, ``beta = 0`` is an EMA of any length, chosen afterwards; ``tau`` to infinity the uniform mean.
    ``beta > 0`` steps past the short mean, away from the long one and a little towards the latest weights: the
    direction in which the run still moves.

    Args:
        ratio: Length of the long mean over that of the short one; above 1. ``None``: searched, in [2, 16].
        max_extrapolation: Largest ``beta``; 0 leaves the kernel's own shapes only.
        kernel: ``exponential``; ``power``, of post-hoc EMA; or ``minus_sqrt``, of WSM.
        latest_share: Share of the latest weights in the point towards which the step leads; in [0, 1].

    Source:
        Post-hoc choice of an EMA's length: Karras et al. 2024, arXiv:2312.02696. Stepping past merged checkpoints:
        Extra-Merge, arXiv:2605.26484.
    """

    @checked()
    def __init__(
        self,
        *,
        ratio: float | None = 4.0,
        max_extrapolation: float = 2.0,
        kernel: KernelName = "exponential",
        latest_share: float = LATEST_SHARE,
    ) -> None:
        if ratio is not None and not ratio > 1:
            raise ConfigError(f"`ratio > 1` must hold, got {ratio}. The default is 4; `null` searches it.")
        require_at_least("max_extrapolation", max_extrapolation, 0, "0 leaves EMA shapes only.")
        require_choice("kernel", kernel, get_args(KernelName))
        if not 0 <= latest_share <= 1:
            raise ConfigError(f"`0 <= latest_share <= 1` must hold, got {latest_share}. 0 steps past the mean alone.")
        self.ratio = ratio
        self.max_extrapolation = max_extrapolation
        self.kernel = kernel
        self.latest_share = latest_share

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``tau`` (steps), ``beta``, and ``ratio`` where it is searched."""
        num_steps_K = [s.num_steps for s in segments_K if s.num_steps]
        # Below half of the newest segment nothing changes any more; above twice the window all is uniform.
        tau = Interval(low=max(1.0, num_steps_K[-1] / 2), high=max(2.0, 2.0 * sum(num_steps_K)), log=True)
        space = {"tau": tau}
        if self.max_extrapolation > 0:
            space["beta"] = Interval(low=0.0, high=self.max_extrapolation)
        if self.ratio is None and self.max_extrapolation > 0:
            space["ratio"] = Interval(low=2.0, high=16.0, log=True)
        return space

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the kernel's share of each snapshot, and the step's."""
        beta = z_D.get("beta", 0.0)
        short_K = kernel(self.kernel, segments_K, z_D["tau"])
        if beta == 0:
            return short_K
        long_K = kernel(self.kernel, segments_K, z_D["tau"] * (self.ratio or z_D["ratio"]))
        c_K = [(1 + beta * (1 - self.latest_share)) * s - beta * l for s, l in zip(short_K, long_K, strict=True)]
        c_K[-1] += beta * self.latest_share
        return tuple(c_K)

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the optima of earlier runs; nothing without extrapolation, where the EMA anchors cover them."""
        if self.kernel == "minus_sqrt" or self.max_extrapolation < START_BETA:
            return []
        ranges = self.coordinates(segments_K)
        tau = max(ranges["tau"].low, round(START_SHARE * sum(s.num_steps for s in segments_K), 1))
        start = {"tau": tau, "beta": START_BETA, "ratio": self.ratio or 4.0}
        return [{name: start[name] for name in ranges}]

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the coordinates of the kernel, which is this space without extrapolation, if ``tau`` is in range."""
        ranges = self.coordinates(segments_K)
        if name != self.kernel or not ranges["tau"].low <= tau <= ranges["tau"].high:
            return None
        return {n: tau if n == "tau" else r.low for n, r in ranges.items()}

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Say when a longer window or a larger step could gain more."""
        at_high = [n for n, i in self.coordinates(segments_K).items() if near(z_D.get(n, i.low), i.high, i)]
        return [
            f"The best `{name}` lies on its upper bound, {z_D[name]:.4g}. "
            + ("A larger buffer.capacity may gain more." if name == "tau" else "A wider space may gain more.")
            for name in at_high
        ]
