"""The protocol of a space.

Letters: K snapshots, oldest first; D coordinates. ``c_K`` coefficients (they sum to 1), ``z_D`` coordinates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.kernels import KernelName

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
    snapshot: Literal["mean", "point"] | None = None
    # Whether the latest weights win unless another candidate is better for certain: where there is little to gain, the
    # best of a few is too often one that only seems so.
    must_be_certain: bool = False

    @abstractmethod
    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return the D coordinates by name, with their ranges."""

    @abstractmethod
    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return K coefficients that sum to 1."""

    def bind(self, names: Sequence[str]) -> Space:
        """Return the space for a model whose tensors have these names; itself by default."""
        return self

    @property
    def space_name(self) -> str:
        """What records and reports call it: the class, in lower case."""
        return type(self).__name__.lower()

    @property
    def group_of(self) -> Mapping[str, str]:
        """Tensor name -> group, where coefficients differ between groups of tensors; empty by default."""
        return {}

    def by_group(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, tuple[float, ...]]:
        """Return each group's K coefficients; empty by default, where all tensors have those of ``coefficients``."""
        return {}

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return coordinates to score before the sampler starts; none by default."""
        return []

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return coordinates whose coefficients are ``c_K``; ``None`` where there are none, or none are known."""
        return None

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the coordinates of the named kernel of length ``tau`` steps; ``None`` where they are not known."""
        return None

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return notes for the user about an optimum at ``z_D``; none by default."""
        return []


def near(value: float, bound: float, interval: Interval) -> bool:
    """Whether ``value`` is within 1 % of the interval's length of ``bound``, on the interval's own scale."""
    scale = math.log if interval.log else float
    return abs(scale(value) - scale(bound)) <= 0.01 * (scale(interval.high) - scale(interval.low))
