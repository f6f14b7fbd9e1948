"""Spaces: families of coefficients, and the coordinates that describe them.

Letters: K snapshots, oldest first; D coordinates. ``c_K`` coefficients (they sum to 1), ``z_D`` coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_ckmerge.config import SpaceName, require_at_least, require_positive
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.errors import ConfigError

Coordinates = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The range of one coordinate, both ends included; searched in logarithms if ``log``."""

    low: float
    high: float
    log: bool = False
    integer: bool = False


class Space(ABC):
    """A family of coefficients. Subclass it for your own: two methods, no state.

    ``segments_K`` are the snapshots' places in the run, oldest first; the last one is the latest weights.
    """

    # The kind of snapshots that the space is meant for; ``None``: either.
    snapshot: ClassVar[Literal["mean", "point"] | None] = None

    @abstractmethod
    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return the D coordinates by name, with their ranges."""

    @abstractmethod
    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return K coefficients that sum to 1."""

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return coordinates to score before the sampler starts; none by default."""
        return []

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return what a user should know about an optimum at ``z_D``; nothing by default."""
        return []


class Decay(Space):
    """A decaying kernel over the steps of the run, plus a step past it.

    ``c_K = (1 + beta) k(tau) - beta k(ratio tau)``, where ``k(tau)_K`` is proportional to ``exp(-age / tau)``, summed
    over each snapshot's steps. ``beta = 0`` is an EMA of any length, chosen afterwards; ``tau`` to infinity the uniform
    mean. ``beta > 0`` steps past the short mean, away from the long one: the direction in which the run still moves.

    Args:
        ratio: Length of the long mean over that of the short one; above 1. ``None``: searched, in [2, 16].
        max_extrapolation: Largest ``beta``; 0 leaves EMA shapes only.

    Source:
        Post-hoc choice of an EMA's length: Karras et al. 2024, arXiv:2312.02696. Stepping past merged checkpoints:
        Extra-Merge, arXiv:2605.26484.
    """

    def __init__(self, *, ratio: float | None = 4.0, max_extrapolation: float = 2.0) -> None:
        if ratio is not None and not ratio > 1:
            raise ConfigError(f"`ratio > 1` must hold, got {ratio}. The default is 4; `null` searches it.")
        require_at_least("max_extrapolation", max_extrapolation, 0, "0 leaves EMA shapes only.")
        self.ratio = ratio
        self.max_extrapolation = max_extrapolation

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
        """Return the kernel's share of each snapshot."""
        beta = z_D.get("beta", 0.0)
        short_K = exponential_kernel(segments_K, z_D["tau"])
        if beta == 0:
            return short_K
        long_K = exponential_kernel(segments_K, z_D["tau"] * (self.ratio or z_D["ratio"]))
        return tuple((1 + beta) * s - beta * l for s, l in zip(short_K, long_K, strict=True))

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Say when a longer window or a larger step could gain more."""
        at_high = [n for n, i in self.coordinates(segments_K).items() if near(z_D.get(n, i.low), i.high, i)]
        return [
            f"The best `{name}` lies on its upper bound, {z_D[name]:.4g}. "
            + ("A larger buffer.capacity may gain more." if name == "tau" else "A wider space may gain more.")
            for name in at_high
        ]


class Pairwise(Space):
    """The paper's space: ``lam theta_t + (1 - lam) theta_{t-1}`` over the last two point snapshots.

    Args:
        alpha: Lower end of ``lam``, in [0, 1). The paper's own value could not be read; at a constant learning rate
            the optimum lies near 0.5, so a narrow interval would clip it.

    Source:
        Liu et al. 2024, arXiv:2403.19390, section 3: one scalar, its end points first, then a Gaussian process.
    """

    snapshot = "point"

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


def make_space(space: SpaceName | Space) -> Space:
    """Return the space that a name stands for; a ``Space`` object passes through."""
    return {"decay": Decay, "pairwise": Pairwise, "window": Window}[space]() if isinstance(space, str) else space


def exponential_kernel(segments_K: Sequence[Segment], tau: float) -> tuple[float, ...]:
    """Return ``exp(-age / tau)`` summed over each segment's steps, normalised to sum 1.

    Args:
        segments_K: K segments, oldest first.
        tau: Decay length in steps; above 0. Infinity gives the uniform mean over all steps.
    """
    newest = max(s.last_step for s in segments_K)

    def kernel_sum(segment: Segment) -> float:
        if math.isinf(tau) or not segment.num_steps:
            return float(segment.num_steps)
        # Geometric sum of num_steps terms. expm1 keeps it exact where tau is far above num_steps.
        return (
            math.exp((segment.last_step - newest) / tau) * math.expm1(-segment.num_steps / tau) / math.expm1(-1 / tau)
        )

    return normalised([kernel_sum(s) for s in segments_K])


def normalised(weights_K: Sequence[float]) -> tuple[float, ...]:
    """Return ``weights_K`` over their sum."""
    total = math.fsum(weights_K)
    return tuple(w / total for w in weights_K)


def near(value: float, bound: float, interval: Interval) -> bool:
    """Whether ``value`` is within 1 % of the interval's length of ``bound``, on the interval's own scale."""
    scale = math.log if interval.log else float
    return abs(scale(value) - scale(bound)) <= 0.01 * (scale(interval.high) - scale(interval.low))
