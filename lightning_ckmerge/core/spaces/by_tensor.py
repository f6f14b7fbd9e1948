"""Another space, whose candidates may be refined tensor by tensor.

Letters: K snapshots, oldest first; D coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space
from lightning_ckmerge.core.spaces.kernels import KernelName


class ByTensor(Space):
    """A bound space with each tensor a group of its own: the same merges, told tensor by tensor.

    Args:
        space: The space, bound to the model.
        names: The model's tensors.
    """

    def __init__(self, space: Space, names: Sequence[str]) -> None:
        self.space = space
        self.snapshot = space.snapshot
        self.must_be_certain = space.must_be_certain
        self._names = tuple(names)

    @property
    def space_name(self) -> str:
        """The inner space's."""
        return self.space.space_name

    @property
    def group_of(self) -> dict[str, str]:
        """Tensor name -> itself."""
        return {name: name for name in self._names}

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return the inner space's."""
        return self.space.coordinates(segments_K)

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the inner space's."""
        return self.space.coefficients(z_D, segments_K)

    def by_group(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, tuple[float, ...]]:
        """Return each tensor's K coefficients: those of its group; empty where all tensors have the same."""
        by_group = self.space.by_group(z_D, segments_K)
        return {name: by_group[self.space.group_of[name]] for name in self._names} if by_group else {}

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the inner space's."""
        return self.space.initial(segments_K)

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the inner space's."""
        return self.space.inverse(c_K, segments_K)

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the inner space's."""
        return self.space.place_of_kernel(name, tau, segments_K)

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return the inner space's."""
        return self.space.warnings(z_D, segments_K)
