"""Coefficients that differ between groups of tensors.

Letters: K snapshots, oldest first; D coordinates; G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from lightning_ckmerge.checks import checked, require_positive
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space
from lightning_ckmerge.core.spaces.decay import Decay
from lightning_ckmerge.core.spaces.groups import GroupRule, assign_groups, check_members, check_patterns
from lightning_ckmerge.core.spaces.kernels import KernelName
from lightning_ckmerge.errors import ConfigError

# A kind's best `tau` over the best shared one, in three runs of a small GPT (`python -m benchmarks.quality.factors`).
KIND_FACTORS = {"embeddings": 1.65, "attention": 1.2, "mlp": 0.8}


class Grouped(Space):
    """Another space, one of whose coordinates differs between groups of tensors: by given factors, and by search.

    The factors cost nothing: a search has the inner space's coordinates. The default ones are for groups by ``kind``:
    embeddings are best averaged over longer, and MLPs over shorter times than the rest. With ``max_deviation`` above
    0 a search has a further coordinate a group, in a narrow range around 0. A model in which nothing sets two groups
    apart, such as one without embeddings, attention and MLPs, is merged as by the inner space.

    Args:
        space: The inner space; ``None``: `decay`.
        groups: ``kind`` (embeddings, attention, mlp, norms, head, other), ``depth`` (three bands of layers), or group
            -> regular expression on tensors' names.
        along: The inner space's coordinate that differs between groups; ``None``: its first, ``tau`` of `decay`.
        factors: Group -> factor of that coordinate; above 0, and 1 for groups that are not named.
            ``None``: those measured for `decay`, where groups are by ``kind``; else none.
        max_deviation: Largest searched deviation, as a share of that coordinate's range on its own scale; in [0, 1].
            Of `decay` 0.2 is a factor of about 3 in ``tau``.

    Raises:
        ConfigError: An argument is outside its range, a pattern is no regular expression, or a factor has no group.
    """

    @checked()
    def __init__(
        self,
        *,
        space: Space | None = None,
        groups: GroupRule | dict[str, str] = "kind",
        along: str | None = None,
        factors: dict[str, float] | None = None,
        max_deviation: float = 0.0,
    ) -> None:
        if not 0 <= max_deviation <= 1:
            raise ConfigError(f"`0 <= max_deviation <= 1` must hold, got {max_deviation}. 0 keeps to the factors.")
        for group, factor in (factors or {}).items():
            require_positive(f"factors.{group}", factor, "1 leaves the group where it is.")
        check_patterns(groups)
        check_members(groups, factors or {}, "factors")
        self.space = space or Decay()
        is_measured = groups == "kind" and isinstance(self.space, Decay) and along in (None, "tau")
        self.factors = dict(KIND_FACTORS if factors is None and is_measured else factors or {})
        self.groups = groups
        self.along = along
        self.max_deviation = max_deviation
        self.snapshot = self.space.snapshot
        self._group_of: dict[str, str] = {}

    def bind(self, names: Sequence[str]) -> Grouped:
        """Return this space with the groups of a model of tensors ``names``; none where nothing sets them apart."""
        bound = copy.copy(self)
        group_of = assign_groups(names, self.groups)
        found = set(group_of.values())
        may_deviate = self.max_deviation > 0 and len(found) > 1
        differ = may_deviate or len({self.factors.get(group, 1.0) for group in found}) > 1
        bound._group_of = group_of if differ else {}
        return bound

    @property
    def group_of(self) -> dict[str, str]:
        """Tensor name -> group, once bound."""
        return self._group_of

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return the inner space's, and one deviation a group, such as ``tau_mlp``."""
        inner = self.space.coordinates(segments_K)
        if self.max_deviation == 0:
            return inner
        deviation = Interval(low=-self.max_deviation, high=self.max_deviation)
        return inner | {f"{self._along(inner)}_{group}": deviation for group in self._names}

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the inner space's, which groups deviate from."""
        return self.space.coefficients(z_D, segments_K)

    def by_group(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, tuple[float, ...]]:
        """Return each group's K coefficients."""
        inner = self.space.coordinates(segments_K)
        along = self._along(inner)
        found = {}
        for group in self._names:
            place = self.factors.get(group, 1.0) * z_D[along]
            place = _moved(place, z_D.get(f"{along}_{group}", 0.0), inner[along])
            found[group] = self.space.coefficients({**z_D, along: place}, segments_K)
        return found

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the inner space's, without deviations."""
        return [self._undeviating(z_D, segments_K) for z_D in self.space.initial(segments_K)]

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the inner space's coordinates, without deviations; ``None`` where factors set the groups apart."""
        z_D = None if self._has_factors else self.space.inverse(c_K, segments_K)
        return None if z_D is None else self._undeviating(z_D, segments_K)

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the inner space's place, without deviations; ``None`` where factors set the groups apart."""
        z_D = None if self._has_factors else self.space.place_of_kernel(name, tau, segments_K)
        return None if z_D is None else self._undeviating(z_D, segments_K)

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return the inner space's."""
        return self.space.warnings(z_D, segments_K)

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(self._group_of.values()))

    @property
    def _has_factors(self) -> bool:
        return any(self.factors.get(group, 1.0) != 1 for group in self._names)

    def _along(self, inner: dict[str, Interval]) -> str:
        if self.along is None:
            return next(iter(inner))
        if self.along not in inner:
            raise ConfigError(
                f"`along` must be a coordinate of the inner space, got {self.along!r}. They are: {', '.join(inner)}."
            )
        return self.along

    def _undeviating(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, float]:
        return {name: z_D.get(name, 0.0) for name in self.coordinates(segments_K)}


def _moved(value: float, share: float, interval: Interval) -> float:
    """Return ``value`` moved by a share of the interval's length on its own scale, and kept inside it."""
    if interval.log:
        value *= (interval.high / interval.low) ** share
    else:
        value += share * (interval.high - interval.low)
    return min(max(value, interval.low), interval.high)
