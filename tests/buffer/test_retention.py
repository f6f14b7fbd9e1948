"""The buffer over whole runs: what stays, for any capacity, length and rhythm of segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ckmerge.buffer.archive import lost
from lightning_ckmerge.buffer.retention import Drop, Pool, decide, pooled, size_class
from lightning_ckmerge.core.segments import Segment

FINEST = 25
capacities = st.integers(2, 14)
# 25 and now and then a little more: a step counter that jumps ends a segment late.
lengths = st.lists(st.sampled_from([25, 25, 25, 26, 27, 49]), min_size=1, max_size=300)


def mean(first_step: int, last_step: int) -> Segment:
    return Segment(kind="mean", first_step=first_step, last_step=last_step, num_updates=last_step - first_step + 1)


def admit(buffer: list[Segment], segment: Segment, capacity: int, layout: str) -> list[Segment]:
    """Return the buffer after one more segment."""
    buffer = [*buffer, segment]
    while action := decide(buffer, capacity=capacity, layout=layout, finest=FINEST):
        i = action.index
        buffer[i : i + (1 if isinstance(action, Drop) else 2)] = (
            [] if isinstance(action, Drop) else [pooled(*buffer[i : i + 2])]
        )
    return buffer


def buffers(capacity: int, lengths_N: list[int], layout: str = "geometric") -> list[list[Segment]]:
    """Return the buffer after each segment of a run."""
    history, buffer, step = [], [], 0
    for num_steps in lengths_N:
        buffer = admit(buffer, mean(step + 1, step + num_steps), capacity, layout)
        step += num_steps
        history.append(buffer)
    return history


@given(capacities, lengths, st.sampled_from(["geometric", "uniform"]))
def test_a_ring_is_never_over_capacity_and_has_no_gap_or_overlap(
    capacity: int, lengths_N: list[int], layout: str
) -> None:
    for buffer in buffers(capacity, lengths_N, layout):
        assert len(buffer) <= capacity
        assert all(newer.first_step == older.last_step + 1 for older, newer in pairwise(buffer))
        assert all(s.num_updates == s.num_steps for s in buffer)


@given(capacities, lengths)
def test_a_geometric_ring_spans_the_last_half_of_the_run(capacity: int, lengths_N: list[int]) -> None:
    """Goes red if the oldest is dropped as soon as the buffer is full."""
    for buffer in buffers(capacity, lengths_N):
        assert buffer[0].first_step <= buffer[-1].last_step / 2 + 1


@given(capacities, lengths)
def test_a_geometric_ring_is_never_finer_in_the_past(capacity: int, lengths_N: list[int]) -> None:
    """Goes red if a pair of the largest size is pooled first."""
    for buffer in buffers(capacity, lengths_N):
        classes = [size_class(s, FINEST) for s in buffer]
        assert all(newer <= older for older, newer in pairwise(classes))


@given(capacities, lengths)
def test_the_newest_snapshot_is_at_most_a_pool_of_two(capacity: int, lengths_N: list[int]) -> None:
    """Goes red if the newest pair of a size is pooled."""
    for n, buffer in enumerate(buffers(capacity, lengths_N)):
        assert buffer[-1].num_steps in (lengths_N[n], sum(lengths_N[n - 1 : n + 1]))


@given(capacities, lengths)
def test_a_uniform_ring_keeps_the_newest(capacity: int, lengths_N: list[int]) -> None:
    *_, last = buffers(capacity, lengths_N, "uniform")
    assert [s.num_steps for s in last] == lengths_N[-capacity:]


def test_nothing_happens_below_capacity() -> None:
    buffer = [mean(25 * i + 1, 25 * i + 25) for i in range(10)]
    assert decide(buffer, capacity=10, layout="geometric", finest=FINEST) is None


def test_the_oldest_goes_only_if_the_rest_is_60_percent_of_the_run() -> None:
    enough = [mean(1, 40), mean(41, 75), mean(76, 100)]
    too_little = [mean(1, 41), mean(42, 75), mean(76, 100)]
    assert decide(enough, capacity=2, layout="geometric", finest=FINEST) == Drop(0)
    assert decide(too_little, capacity=2, layout="geometric", finest=FINEST) == Pool(0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([400, 50, 50, 50, 25, 25, 25], Pool(4)),
        ([200, 50, 50, 50, 25, 25], Pool(1)),
        ([400, 50, 50, 25, 25], Pool(3)),
        ([400, 100, 50, 25], Pool(0)),
    ],
    ids=["smallest size with three", "three before two", "smallest size with two", "no two of a size"],
)
def test_which_two_are_pooled(sizes: list[int], expected: Pool) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    buffer = [mean(end - size + 1, end) for end, size in zip(ends, sizes, strict=True)]
    assert decide(buffer, capacity=len(sizes) - 1, layout="geometric", finest=FINEST) == expected


def test_a_gap_keeps_members_of_a_size_apart() -> None:
    """Three of the finest size, no two of them neighbours: only neighbours are pooled."""
    buffer = [mean(1001, 1025), mean(1101, 1200), mean(1201, 1225), mean(1226, 1325), mean(1326, 1350)]
    assert decide(buffer, capacity=4, layout="geometric", finest=FINEST) == Pool(0)


@pytest.mark.parametrize(("kind", "num_updates"), [("mean", 75), ("point", 1)])
def test_a_pool_stands_for_both(kind: str, num_updates: int) -> None:
    n = 1 if kind == "point" else 25
    older = Segment(kind=kind, first_step=26, last_step=50, num_updates=n)
    newer = Segment(kind=kind, first_step=51, last_step=100, num_updates=1 if kind == "point" else 50)
    assert pooled(older, newer) == Segment(kind=kind, first_step=26, last_step=100, num_updates=num_updates)


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([(3, 3)], "merges will miss step 3"),
        ([(1, 4), (5, 8)], "merges will miss steps 1 to 8"),
        ([(1, 4), (5, 5), (9, 9)], "merges will miss steps 1 to 5, 9"),
    ],
)
def test_lost_steps_are_told_in_one_breath(spans: list[tuple[int, int]], told: str) -> None:
    assert lost(*(Segment(kind="mean", first_step=first, last_step=last) for first, last in spans)) == told
