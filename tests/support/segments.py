"""Places of snapshots in a run, for hypothesis: any segments that a buffer may hold, and the latest weights."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Interval, Space


def means(lengths: Sequence[int], *, start: int = 0) -> list[Segment]:
    """Return adjacent segments of these lengths, oldest first."""
    segments = []
    for length in lengths:
        segments.append(Segment(kind="mean", first_step=start + 1, last_step=start + length, num_updates=length))
        start += length
    return segments


def with_latest(segments: Sequence[Segment], steps_since: int = 0) -> tuple[Segment, ...]:
    """Add the latest weights, ``steps_since`` steps after the newest segment; 0: covered by it."""
    end = segments[-1].last_step
    latest = Segment(
        kind="point", first_step=end + min(1, steps_since), last_step=end + steps_since, covered=not steps_since
    )
    return (*segments, latest)


def runs(max_length: int = 10**9, max_segments: int = 16) -> st.SearchStrategy[tuple[Segment, ...]]:
    """Draw K segments: late or early in the run, short or huge, the latest weights covered or not."""
    lengths = st.lists(st.integers(1, max_length), min_size=1, max_size=max_segments)
    segments = st.builds(lambda lengths, start: means(lengths, start=start), lengths, st.integers(0, max_length))
    return st.builds(with_latest, segments, st.just(0) | st.integers(0, max_length))


def coordinates(space: Space, segments_K: Sequence[Segment]) -> st.SearchStrategy[dict[str, float]]:
    """Draw a point of the space; both ends of every range are likely."""

    def inside(interval: Interval) -> st.SearchStrategy[float]:
        if interval.integer:
            return st.integers(int(interval.low), int(interval.high)).map(float)
        return st.sampled_from([interval.low, interval.high]) | st.floats(interval.low, interval.high)

    return st.fixed_dictionaries({name: inside(i) for name, i in space.coordinates(segments_K).items()})
