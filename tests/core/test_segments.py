"""Which steps count for a snapshot."""

from __future__ import annotations

import pytest

from lightning_ckmerge.core.segments import Segment


def test_a_segment_counts_both_of_its_ends() -> None:
    assert Segment(kind="mean", first_step=5, last_step=9).num_steps == 5
    assert Segment(kind="point", first_step=9, last_step=9).num_steps == 1


def test_covered_steps_do_not_count_twice() -> None:
    assert Segment(kind="point", first_step=9, last_step=9, covered=True).num_steps == 0


def test_a_segment_does_not_run_backwards() -> None:
    with pytest.raises(AssertionError):
        Segment(kind="mean", first_step=2, last_step=1)
