from __future__ import annotations

import math

import pytest
import torch

from lightning_ckmerge.core.geometry import measure_geometry


@pytest.mark.parametrize(
    ("dtype", "side"), [(torch.float32, 2.0**-16), (torch.float64, 2.0**-16), (torch.bfloat16, 1.0)]
)
def test_places_on_a_square_are_told_though_it_lies_far_away(dtype: torch.dtype, side: float) -> None:
    """Goes red if inner products of the checkpoints themselves are taken: 1e7 leaves no digit for 2e-10."""
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    far = [torch.tensor([128.0, 64.0], dtype=torch.float64) + side * torch.tensor(c) for c in corners]
    tensors_KN = [[torch.full((3, 1 << 10), 64.0, dtype=dtype), place.to(dtype)] for place in far]
    found = measure_geometry(tensors_KN)
    assert found.distances_KK[0] == pytest.approx([0, side, math.sqrt(2) * side, side])
    assert found.cosines_UU == [pytest.approx(row, abs=1e-12) for row in ([1, 0, -1], [0, 1, 0], [-1, 0, 1])]
    assert found.norm == pytest.approx(math.sqrt(3 * 1024 * 64**2 + 128**2 + (64 + side) ** 2))


def test_an_update_that_did_not_move_has_no_direction() -> None:
    still = [[torch.ones(4)], [torch.ones(4)], [torch.zeros(4)]]
    assert measure_geometry(still).cosines_UU == [[0.0, 0.0], [0.0, 1.0]]
