"""Mixtures of sources, and where they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_ckmerge.errors import SnapshotError
from lightning_ckmerge.studies.account.places import Places, layers, make_plane, measure, partition

NAMES = ["embed.weight", "blocks.0.attn.weight", "blocks.1.mlp.weight"]
C_K = [0.2, -0.1, 0.9]
MANIFEST = {"coefficients": C_K}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 2, generator=generator, dtype=torch.float64) for name in NAMES}


def value(rows: dict[str, np.ndarray], sources: list[dict[str, torch.Tensor]], cell_of: dict[str, str]) -> torch.Tensor:
    parts = [sum(float(c) * s[n] for c, s in zip(rows[cell_of[n]], sources, strict=True)) for n in NAMES]
    return torch.cat([torch.as_tensor(p).reshape(-1) for p in parts])


SNAPSHOTS = [weights(seed) for seed in range(3)]
MERGE = {n: sum(c * s[n] for c, s in zip(C_K, SNAPSHOTS, strict=True)) for n in NAMES}


@pytest.mark.parametrize("k", range(3))
def test_without_a_snapshot_the_others_keep_their_proportions(k: int) -> None:
    """The merge and the snapshot itself are enough for it: the others may have rotated out."""
    cell_of, cells = partition(NAMES, MANIFEST)
    places = Places(cells, sorted({k, 2}), has_merge=True)
    rest = [0.0 if j == k else c / (1 - C_K[k]) for j, c in enumerate(C_K)]
    expected = torch.cat([sum(c * s[n] for c, s in zip(rest, SNAPSHOTS, strict=True)).reshape(-1) for n in NAMES])
    rows = places.without(k)
    assert rows is not None
    found = value(rows, [MERGE, *(SNAPSHOTS[j] for j in places.kept)], cell_of)
    torch.testing.assert_close(found, expected)


def test_nothing_is_left_without_the_only_snapshot() -> None:
    _, cells = partition(NAMES, {"coefficients": [0.0, 0.0, 1.0]})
    places = Places(cells, [0, 1, 2], has_merge=True)
    assert places.without(2) is None
    assert [places.counts(k) for k in range(3)] == [False, False, True]


def test_a_record_is_mixed_from_its_snapshots_if_all_that_count_are_kept() -> None:
    cell_of, cells = partition(NAMES, MANIFEST)
    found = value(Places(cells, [0, 1, 2], has_merge=False).merge(), SNAPSHOTS, cell_of)
    torch.testing.assert_close(found, torch.cat([MERGE[n].reshape(-1) for n in NAMES]))
    with pytest.raises(SnapshotError, match="no longer kept"):
        Places(cells, [0, 2], has_merge=False)


def test_groups_of_the_merge_keep_their_own_coefficients() -> None:
    groups = {"mlp": {"coefficients": [0.5, 0.5, 0.0], "tensors": [NAMES[2]]}}
    cell_of, cells = partition(NAMES, {**MANIFEST, "groups": groups})
    assert cells[cell_of[NAMES[2]]].c_K == (0.5, 0.5, 0.0)
    assert cells[cell_of[NAMES[0]]].c_K == tuple(C_K)


def test_a_swap_takes_the_chosen_tensors_and_no_others() -> None:
    cell_of, cells = partition(NAMES, MANIFEST)
    places = Places(cells, [0, 1, 2], has_merge=True)
    rows = places.swapped(places.latest(), places.merge(), lambda cell: cell.group == "mlp", 0.5)
    found = value(rows, [MERGE, *SNAPSHOTS], cell_of).split(6)
    torch.testing.assert_close(found[0], SNAPSHOTS[2][NAMES[0]].reshape(-1))
    torch.testing.assert_close(found[2], ((SNAPSHOTS[2][NAMES[2]] + MERGE[NAMES[2]]) / 2).reshape(-1))


def test_distances_are_those_of_the_weights() -> None:
    cell_of, cells = partition(NAMES, MANIFEST)
    places = Places(cells, [0, 1, 2], has_merge=True)
    sources = [MERGE, *SNAPSHOTS]
    geometry = measure(sources, cell_of, cells)
    a, b = value(places.mean(), sources, cell_of), value(places.merge(), sources, cell_of)
    assert geometry.distance(places.mean(), places.merge()) == pytest.approx(float((a - b).norm()))


def test_the_plane_is_orthonormal_and_holds_its_corners() -> None:
    cell_of, cells = partition(NAMES, MANIFEST)
    places = Places(cells, [0, 1, 2], has_merge=True)
    sources = [MERGE, *SNAPSHOTS]
    plane = make_plane(places.latest(), places.merge(), places.mean(), measure(sources, cell_of, cells))
    assert plane is not None
    for corner, rows in zip(plane.corners, (places.latest(), places.merge(), places.mean()), strict=True):
        torch.testing.assert_close(value(plane.at(*corner), sources, cell_of), value(rows, sources, cell_of))
    origin, right, up = (value(plane.at(*p), sources, cell_of) for p in ((0, 0), (1, 0), (0, 1)))
    assert float((right - origin).norm()) == pytest.approx(1)
    assert float((up - origin).norm()) == pytest.approx(1)
    assert float((right - origin) @ (up - origin)) == pytest.approx(0, abs=1e-9)


def test_three_mixtures_on_a_line_span_no_plane() -> None:
    cell_of, cells = partition(NAMES, MANIFEST)
    places = Places(cells, [0, 1, 2], has_merge=True)
    geometry = measure([MERGE, *SNAPSHOTS], cell_of, cells)
    half = places.swapped(places.latest(), places.merge(), lambda cell: True, 0.5)
    assert make_plane(places.latest(), places.merge(), half, geometry) is None
    assert make_plane(places.latest(), places.latest(), half, geometry) is None


def test_many_layers_are_pooled_in_bands() -> None:
    found = layers([f"h.{i}.w" for i in range(30)])
    assert len(set(found.values())) == 12
    assert found["h.0.w"] == "layers 0-2"
    assert found["h.29.w"] == "layers 28-29"
