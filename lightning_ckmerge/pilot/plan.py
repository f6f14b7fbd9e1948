"""The merges that a pilot study scores, known before it begins.

Letters: K checkpoints, oldest first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_ckmerge.checks import require_at_least
from lightning_ckmerge.errors import ConfigError

Path = Literal["linear", "slerp"]

# Places along a pair, those first that tell the most: the middle, past either end, and what lies between.
LAMS = (0.5, 1.25, -0.25, 0.25, 0.75, 1.5, -0.5)
# Every checkpoint, every second one, ...
MAX_STRIDE = 4
# Uniform means at one stride.
MAX_MEANS = 12
# Finalists that are scored on the confirmation half.
MAX_CONFIRMED = 5
# Least of a thinned study: a map of three checkpoints, two means, four places on lines.
MIN_MAP, MIN_MEANS, MIN_PLACES = 3, 2, 4
# Shares of a limit; the map takes the rest, as the widest of the three questions.
SHARE_OF_MEANS, SHARE_OF_PLACES = 0.15, 0.25
# So many digits of ``lam`` are kept.
DIGITS = 4


@dataclass(frozen=True)
class Merge:
    """A merge of checkpoints.

    Args:
        places: Which checkpoints, counted from the oldest, from 0.
        weights: Their coefficients, which sum to 1; for ``slerp`` the shares of the way.
        path: ``linear``: a weighted sum. ``slerp``: a point on the great circle between two, tensor by tensor.
    """

    places: tuple[int, ...]
    weights: tuple[float, ...]
    path: Path = "linear"

    @property
    def lam(self) -> float:
        """The newest checkpoint's coefficient."""
        return self.weights[-1]

    def coefficients(self, num_checkpoints: int) -> tuple[float, ...]:
        """Return the K coefficients.

        >>> between(0, 2, 0.25).coefficients(4)
        (0.75, 0.0, 0.25, 0.0)
        """
        by_place = dict(zip(self.places, self.weights, strict=True))
        return tuple(by_place.get(k, 0.0) for k in range(num_checkpoints))

    def key(self) -> str:
        """Return a text that stands for it.

        >>> between(0, 2, 0.25, "slerp").key()
        'slerp 0:0.75 2:0.25'
        """
        return " ".join([self.path, *(f"{k}:{w!r}" for k, w in zip(self.places, self.weights, strict=True))])


def single(place: int) -> Merge:
    """Return one checkpoint as it is."""
    return Merge((place,), (1.0,))


def mean(places: Sequence[int]) -> Merge:
    """Return the uniform mean of checkpoints."""
    return Merge(tuple(places), (1 / len(places),) * len(places))


def between(older: int, newer: int, lam: float, path: Path = "linear") -> Merge:
    """Return ``lam`` of the newer checkpoint and ``1 - lam`` of the older one.

    >>> between(0, 1, 0.5) == mean([0, 1]), between(0, 1, 1.0) == single(1)
    (True, True)
    """
    lam = round(lam, DIGITS)
    if lam in (0.0, 1.0):
        return single(newer if lam else older)
    return Merge((older, newer), (round(1 - lam, DIGITS), lam), path)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The uniform mean of the newest checkpoints, ``num`` of them, each ``stride`` places before the next."""

    num: int
    stride: int

    def places(self, num_checkpoints: int) -> tuple[int, ...]:
        """Return which checkpoints it takes.

        >>> Window(num=3, stride=2).places(8)
        (3, 5, 7)
        """
        last = num_checkpoints - 1
        return tuple(last - self.stride * i for i in reversed(range(self.num)))


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study scores.

    Args:
        num_checkpoints: K.
        mapped: Checkpoints of the map, oldest first: each of them, and each pair of them.
        windows: Uniform means.
        lines: Pairs along which ``lam`` is varied: adjacent, distant, and one between.
        places: Merges on these lines, but for their ends.
    """

    num_checkpoints: int
    mapped: tuple[int, ...]
    windows: tuple[Window, ...]
    lines: tuple[tuple[int, int], ...]
    places: tuple[Merge, ...]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of the map."""
        return list(itertools.combinations(self.mapped, 2))

    @property
    def known(self) -> list[Merge]:
        """Merges on the search half that are known beforehand, each once, in the order of the study."""
        return _once(
            [
                *(single(k) for k in self.mapped),
                *(between(i, j, 0.5) for i, j in self.pairs),
                *(mean(w.places(self.num_checkpoints)) for w in self.windows),
                *self.places,
            ]
        )

    @property
    def num_evaluations(self) -> int:
        """The most evaluations that it takes: a second one for each pair at its best ``lam``, and the finalists'."""
        num = len(self.mapped)
        num_pairs = num * (num - 1) // 2
        # Not by `known`, which is long: plans are counted many times before one fits.
        beside = {mean(w.places(self.num_checkpoints)) for w in self.windows} | set(self.places)
        mapped = set(self.mapped)
        on_map = {m for m in beside if m == mean(m.places) and len(m.places) <= 2 and mapped.issuperset(m.places)}
        num_beside = len(beside - on_map)
        return num + 2 * num_pairs + num_beside + MAX_CONFIRMED

    def told(self) -> str:
        """Return the plan in a sentence."""
        num_means = len(self.windows)
        of_them = "" if len(self.mapped) == self.num_checkpoints else f" {len(self.mapped)} of"
        return (
            f"{self.num_checkpoints} checkpoints, at most {self.num_evaluations} evaluations:{of_them} the checkpoints "
            f"and their {len(self.pairs)} pairs at two `lam`, {num_means} uniform means, {len(self.places)} places on "
            f"{len(self.lines)} lines, {MAX_CONFIRMED} finalists on the confirmation half. Some coincide."
        )


def make_plan(num_checkpoints: int, max_evaluations: int | None = None, *, slerp: bool = True) -> StudyPlan:
    """Return the plan of a study.

    Under a limit the map gets fewer checkpoints, which lie the closer together the newer they are, and keeps all pairs
    of those: so it shows neighbours and distant pairs, without holes. Of the means and the lines the first ones stay.

    Args:
        num_checkpoints: K, at least 2.
        max_evaluations: The most that it may take; ``None``: no limit.
        slerp: Whether great circles are followed, beside straight lines.

    Raises:
        ConfigError: The limit is too low for any study.

    >>> make_plan(8).num_evaluations, make_plan(8, 60).num_evaluations, make_plan(8, 60).mapped
    (110, 56, (0, 3, 5, 6, 7))
    """
    require_at_least("max_evaluations", max_evaluations, 1, "Leave it out for no limit.")
    lines = _lines(num_checkpoints)
    windows = _windows(num_checkpoints)
    places = _places(lines, slerp=slerp)

    def plan(num_mapped: int, num_windows: int, num_places: int) -> StudyPlan:
        return StudyPlan(
            num_checkpoints=num_checkpoints,
            mapped=_closer_to_the_newest(num_checkpoints, num_mapped),
            windows=tuple(sorted(windows[:num_windows], key=lambda w: (w.stride, w.num))),
            lines=lines,
            places=tuple(places[:num_places]),
        )

    whole = plan(num_checkpoints, len(windows), len(places))
    if max_evaluations is None or whole.num_evaluations <= max_evaluations:
        return whole
    num_windows = min(len(windows), max(MIN_MEANS, int(SHARE_OF_MEANS * max_evaluations)))
    num_places = min(len(places), max(MIN_PLACES, int(SHARE_OF_PLACES * max_evaluations)))
    smallest = min(MIN_MAP, num_checkpoints)
    sizes = [
        *((num, num_windows, num_places) for num in range(num_checkpoints, smallest - 1, -1)),
        (smallest, min(len(windows), MIN_MEANS), MIN_PLACES),
    ]
    fitting = (size for size in sizes if plan(*size).num_evaluations <= max_evaluations)
    if (size := next(fitting, None)) is None:
        raise ConfigError(
            f"`max_evaluations >= {plan(*sizes[-1]).num_evaluations}` must hold for a study of {num_checkpoints} "
            f"checkpoints, got {max_evaluations}. All of it takes {whole.num_evaluations}."
        )
    # What the map leaves over goes to the lines, and then to the means.
    num, num_windows, num_places = size
    while num_places < len(places) and plan(num, num_windows, num_places + 1).num_evaluations <= max_evaluations:
        num_places += 1
    while num_windows < len(windows) and plan(num, num_windows + 1, num_places).num_evaluations <= max_evaluations:
        num_windows += 1
    return plan(num, num_windows, num_places)


def _lines(num_checkpoints: int) -> tuple[tuple[int, int], ...]:
    """The newest two, the oldest and the newest, and the newest with one halfway between by the number of steps."""
    last = num_checkpoints - 1
    gaps = dict.fromkeys((1, last, round(math.sqrt(last))))
    return tuple((last - gap, last) for gap in gaps)


def _places(lines: Sequence[tuple[int, int]], *, slerp: bool) -> list[Merge]:
    """Places on the lines, the first lines and the most telling places first."""
    paths: tuple[Path, ...] = ("linear", "slerp") if slerp else ("linear",)
    first, others = lines[:2], lines[2:]
    return _once(
        between(*line, lam, path) for group in (first, others) for lam in LAMS for line in group for path in paths
    )


def _windows(num_checkpoints: int) -> list[Window]:
    """Uniform means, at every stride those first that are spread most widely."""
    found = []
    for stride in range(1, MAX_STRIDE + 1):
        longest = (num_checkpoints - 1) // stride + 1
        found += [Window(num=2 + i, stride=stride) for i in spread(longest - 1)[:MAX_MEANS]]
    return found


def spread(num: int) -> list[int]:
    """Return ``range(num)`` in an order whose beginnings are spread evenly: the ends, and then halves.

    >>> spread(6)
    [5, 0, 2, 1, 3, 4]
    """
    order: list[int] = [num - 1, 0] if num > 1 else list(range(num))
    level = [(0, num - 1)] if num > 2 else []
    while level:
        after = []
        for low, high in level:
            if high - low > 1:
                middle = (low + high) // 2
                order.append(middle)
                after += [(low, middle), (middle, high)]
        level = after
    return order


def _closer_to_the_newest(num_checkpoints: int, num: int) -> tuple[int, ...]:
    """Return ``num`` places, the newest and the oldest among them, whose distances from the newest grow by a factor."""
    last = num_checkpoints - 1
    if num > last:
        return tuple(range(num_checkpoints))
    ages = [0]
    for i in range(1, num):
        left = num - 1 - i
        # Each age is one more than the last at least, and leaves room for the rest.
        ideal = round(num_checkpoints ** (i / (num - 1))) - 1
        ages.append(min(max(ideal, ages[-1] + 1), last - left))
    return tuple(last - age for age in reversed(ages))


def _once(merges: Iterable[Merge]) -> list[Merge]:
    return list(dict.fromkeys(merges))
