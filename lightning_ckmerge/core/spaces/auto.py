"""`decay`, searched together with the choices that other spaces fix.

Letters: K snapshots, oldest first; D coordinates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces.base import Coordinates, Interval, Space
from lightning_ckmerge.core.spaces.decay import Decay
from lightning_ckmerge.core.spaces.grouped import KIND_FACTORS, Grouped
from lightning_ckmerge.core.spaces.kernels import KernelName

# The third one, `minus_sqrt`, lost to both in each of six runs (`python -m benchmarks.quality.measure`).
KERNELS: tuple[KernelName, ...] = ("exponential", "power")
MIN_WINDOW = 2
MAX_POOL = 2


class Auto(Space):
    """`decay`, with kernel, window, segment length and groups searched too, all in one study.

    Beside ``tau`` and ``beta`` it has four whole numbers: ``kernel``, 0 for exponential, 1 for power; ``window``, how
    many of the newest snapshots take part; ``pool``, 0 for snapshots as they are, 1 for pairs and 2 for fours of them,
    counted from the newest, each as if it were one snapshot; ``groups``, 0 for one set of coefficients, 1 for the
    factors of `grouped`, by kind. So many coordinates want more trials: 32 or more.
    """

    def __init__(self) -> None:
        self._grouped = Grouped(space=self, factors=KIND_FACTORS)

    def bind(self, names: Sequence[str]) -> Auto:
        """Return this space with the kinds that a model of tensors ``names`` has."""
        bound = copy.copy(self)
        bound._grouped = self._grouped.bind(names)
        return bound

    @property
    def group_of(self) -> dict[str, str]:
        """Tensor name -> kind, once bound."""
        return self._grouped.group_of

    def coordinates(self, segments_K: Sequence[Segment]) -> dict[str, Interval]:
        """Return ``tau``, ``beta``, ``kernel``, ``window``, ``pool`` and ``groups``."""
        num_counted = sum(1 for s in segments_K if s.num_steps)
        choices = {
            "kernel": (0, len(KERNELS) - 1),
            "window": (min(MIN_WINDOW, num_counted), num_counted),
            "pool": (0, min(MAX_POOL, math.floor(math.log2(num_counted)))),
            "groups": (0, int(bool(self.group_of))),
        }
        whole = {name: Interval(low=low, high=high, integer=True) for name, (low, high) in choices.items()}
        return Decay().coordinates(segments_K) | whole

    def coefficients(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> tuple[float, ...]:
        """Return the kernel's share of each pool, split among its snapshots by their steps."""
        inside_K = _newest(int(z_D["window"]), segments_K)
        share_K = Decay(kernel=KERNELS[int(z_D["kernel"])]).coefficients(z_D, inside_K)
        # The latest weights' own share; what takes part belongs to a pool.
        c_K = [0.0 if s.num_steps else share for share, s in zip(share_K, inside_K, strict=True)]
        for pool in _pools(2 ** int(z_D["pool"]), inside_K):
            num_steps = sum(inside_K[k].num_steps for k in pool)
            for k in pool:
                c_K[k] = math.fsum(share_K[j] for j in pool) * (inside_K[k].num_steps / num_steps)
        return tuple(c_K)

    def by_group(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> dict[str, tuple[float, ...]]:
        """Return each kind's K coefficients; empty where ``groups`` is 0."""
        return self._grouped.by_group(z_D, segments_K) if z_D["groups"] else {}

    def initial(self, segments_K: Sequence[Segment]) -> list[dict[str, float]]:
        """Return the coefficients of `grouped`, which takes all snapshots as they are."""
        groups = int(bool(self.group_of))
        return [self._whole(z_D, segments_K, groups=groups) for z_D in Decay().initial(segments_K)]

    def inverse(self, c_K: Sequence[float], segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the coordinates of a mean over the steps of one pool; others are not known."""
        ranges = self.coordinates(segments_K)
        window = sum(1 for c, s in zip(c_K, segments_K, strict=True) if c and s.num_steps)
        pool = math.ceil(math.log2(max(1, window)))
        if window < ranges["window"].low or pool > ranges["pool"].high:
            return None
        # Within one pool the kernel does not count: the middle of its lengths stands for all of them.
        tau = math.sqrt(ranges["tau"].low * ranges["tau"].high)
        z_D = {"tau": tau, "beta": 0.0, "kernel": 0, "window": window, "pool": pool, "groups": 0}
        found_K = self.coefficients(z_D, segments_K)
        return z_D if all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(found_K, c_K, strict=True)) else None

    def place_of_kernel(self, name: KernelName, tau: float, segments_K: Sequence[Segment]) -> dict[str, float] | None:
        """Return the coordinates of the kernel over all snapshots, the same for all tensors, if ``tau`` is in range."""
        z_D = Decay(kernel=name).place_of_kernel(name, tau, segments_K)
        if z_D is None or name not in KERNELS:
            return None
        return self._whole(z_D, segments_K, kernel=KERNELS.index(name))

    def warnings(self, z_D: Coordinates, segments_K: Sequence[Segment]) -> list[str]:
        """Return those of `decay`; of a narrower window the buffer's capacity is no limit."""
        ranges = self.coordinates(segments_K)
        tau = z_D["tau"] if z_D["window"] == ranges["window"].high else ranges["tau"].low
        return Decay().warnings({**z_D, "tau": tau}, segments_K)

    def _whole(self, z_D: Coordinates, segments_K: Sequence[Segment], **choices: int) -> dict[str, float]:
        """Return a place of `decay` in this space: all snapshots as they are."""
        window = int(self.coordinates(segments_K)["window"].high)
        return {**z_D, "kernel": 0, "window": window, "pool": 0, "groups": 0, **choices}


def _newest(window: int, segments_K: Sequence[Segment]) -> list[Segment]:
    """Return the segments, with those before the window's no longer counted."""
    counted = [k for k, s in enumerate(segments_K) if s.num_steps]
    return [replace(s, covered=s.covered or k < counted[-window]) for k, s in enumerate(segments_K)]


def _pools(size: int, segments_K: Sequence[Segment]) -> Iterator[list[int]]:
    """Yield the counted snapshots' places, ``size`` of them together, from the newest on."""
    counted = [k for k, s in enumerate(segments_K) if s.num_steps]
    while counted:
        yield counted[-size:]
        del counted[-size:]
