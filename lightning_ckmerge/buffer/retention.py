"""Which snapshots stay: pure policy over their places in the run.

Letters: K snapshots, oldest first. A snapshot's *size class* is ``floor(log2(num_steps / finest))``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_ckmerge.config import Layout
from lightning_ckmerge.core.segments import Segment

# Half to two thirds of the run is the window that gains most; 0.6 leaves half of it even after a drop.
MIN_SHARE_OF_RUN = 0.6


@dataclass(frozen=True)
class Drop:
    """Give up snapshot ``index``."""

    index: int


@dataclass(frozen=True)
class Pool:
    """Make one snapshot of ``index`` and the next newer one."""

    index: int


def decide(segments_K: Sequence[Segment], *, capacity: int, layout: Layout, finest: int) -> Drop | Pool | None:
    """Return the step that makes room where there are too many snapshots, else ``None``. Ask again after it.

    ``geometric`` drops the oldest snapshot when the others still stand for 60 % of the run. Otherwise it pools the two
    oldest neighbours of the smallest size class with three members, else with two, else the two oldest snapshots.

    Args:
        segments_K: K segments, oldest first, the newly admitted one included. Lost snapshots may have left gaps.
        capacity: Snapshots that may stay; at least 2.
        layout: ``geometric`` or ``uniform``.
        finest: Steps of the finest segment; at least 1.

    Source:
        Exponential histograms: Datar et al. 2002, "Maintaining stream statistics over sliding windows".

    >>> segments = [Segment(kind="mean", first_step=n + 1, last_step=n + 25) for n in (0, 25, 50)]
    >>> decide(segments, capacity=2, layout="geometric", finest=25)
    Drop(index=0)
    >>> decide(segments, capacity=3, layout="geometric", finest=25) is None
    True
    """
    if len(segments_K) <= capacity:
        return None
    num_steps = segments_K[-1].last_step
    if layout == "uniform" or sum(s.num_steps for s in segments_K[1:]) >= MIN_SHARE_OF_RUN * num_steps:
        return Drop(0)
    classes_K = [size_class(s, finest) for s in segments_K]
    counts = Counter(classes_K)
    oldest_pairs = {c: i for i, c in reversed(list(enumerate(classes_K[:-1]))) if classes_K[i + 1] == c}
    for num_members in (3, 2):
        for c in sorted(oldest_pairs):
            if counts[c] >= num_members:
                return Pool(oldest_pairs[c])
    return Pool(0)


def pooled(older: Segment, newer: Segment) -> Segment:
    """Return the segment that stands for both: a mean of all their updates, or the newer point for all their steps."""
    num_updates = older.num_updates + newer.num_updates if newer.kind == "mean" else newer.num_updates
    return replace(newer, first_step=older.first_step, num_updates=num_updates)


def size_class(segment: Segment, finest: int) -> int:
    """Return ``floor(log2(num_steps / finest))``; shorter segments count as finest ones."""
    return max(segment.num_steps // finest, 1).bit_length() - 1
