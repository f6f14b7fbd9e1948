from __future__ import annotations

import math

import pytest
import torch

from lightning_ckmerge.core.geometry import measure_geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_places_on_a_square_are_told_though_it_lies_far_away(dtype: torch.dtype) -> None:
    """Goes red if inner products of the checkpoints themselves are taken: 4096 ** 2 leaves no digit for 1."""
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    far = [torch.tensor([128.0, 64.0]) + torch.tensor(c, dtype=torch.float32) for c in corners]
    tensors_KN = [[torch.full((3, 1 << 10), 64.0, dtype=dtype), place.to(dtype)] for place in far]
    found = measure_geometry(tensors_KN)
    assert found.distances_KK[0] == pytest.approx([0, 1, math.sqrt(2), 1])
    assert found.cosines_UU == [pytest.approx(row, abs=1e-12) for row in ([1, 0, -1], [0, 1, 0], [-1, 0, 1])]
    assert found.norm == pytest.approx(math.sqrt(3 * 1024 * 64**2 + 128**2 + 65**2))


def test_an_update_that_did_not_move_has_no_direction() -> None:
    still = [[torch.ones(4)], [torch.ones(4)], [torch.zeros(4)]]
    assert measure_geometry(still).cosines_UU == [[0.0, 0.0], [0.0, 1.0]]
