from __future__ import annotations

from typing import Any

import pytest

from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.report.axes import BOTTOM, LEFT, RIGHT, TOP
from lightning_ckmerge.report.html import render_html
from lightning_ckmerge.report.landscape import NUM_COLUMNS, NUM_LEVELS, NUM_ROWS, draw_landscape
from tests.support.outcomes import make_outcome


def manifest(dims: int, mode: Any = "min") -> dict[str, Any]:
    """Trials on a bowl around (100, 0.6, 0.6), on ``dims`` coordinates; one anchor among them."""
    data = build_manifest(make_outcome(mode=mode))
    names = ["tau", "beta", "ratio"][:dims]
    template, sign = data["trials"][6], 1 if mode == "min" else -1
    data["trials"] = []
    for i in range(16):
        z = [10 ** (1 + i % 4), 0.4 * (i // 4), 0.1 * i][:dims]
        bowl = (i % 4 - 1) ** 2 + (0.4 * (i // 4) - 0.6) ** 2
        score = {**template["search"], "value": 2.0 + sign * 0.01 * bowl, "complete": True}
        trial = {**template, "name": f"trial-{i}", "coordinates": dict(zip(names, z, strict=True)), "search": score}
        data["trials"].append({**trial, "confirm": None})
    data["anchors"][2]["coordinates"] = {n: data["trials"][0]["coordinates"][n] for n in names}
    data["verdict"]["winner"] = "trial-5"
    return data


@pytest.mark.parametrize("mode", ["min", "max"])
def test_two_coordinates_make_a_map_whose_darkest_cell_lies_at_the_optimum(mode: Any) -> None:
    landscape = draw_landscape(manifest(2, mode))
    assert landscape is not None
    assert landscape.map is not None
    assert [s.name for s in landscape.slices] == ["tau", "beta"]
    darkest = [c for c in landscape.map.cells if c.level == NUM_LEVELS - 1]
    winner = next(m for m in landscape.map.marks if m.winner)
    assert min(abs(c.x + c.width / 2 - winner.x) + abs(c.y - winner.y) for c in darkest) < 40
    assert winner.x == pytest.approx(LEFT + (RIGHT - LEFT) / 3)  # tau = 100 of 10 to 10000, by logarithms
    better = min if mode == "min" else max
    assert better(landscape.map.best, landscape.map.worst) == landscape.map.best


def test_the_map_is_covered_once() -> None:
    landscape = draw_landscape(manifest(2))
    assert landscape is not None
    assert landscape.map is not None
    area = sum(c.width * c.height for c in landscape.map.cells)
    assert area == pytest.approx((RIGHT - LEFT) * (BOTTOM - TOP))
    assert len(landscape.map.cells) < NUM_COLUMNS * NUM_ROWS / 2
    assert {c.level for c in landscape.map.cells} == set(range(NUM_LEVELS))


def test_one_coordinate_makes_a_slice_with_mean_and_band() -> None:
    data = manifest(1)
    landscape = draw_landscape(data)
    assert landscape is not None
    assert landscape.map is None
    (chart,) = landscape.slices
    assert chart.line.startswith(f"M{LEFT:.1f} ")
    assert chart.band.endswith("Z")
    assert [m.shape for m in chart.marks].count("diamond") == 1
    assert sum(m.winner for m in chart.marks) == 1
    page = render_html(data)
    assert 'class="band"' in page
    assert "Along tau" in page


def test_three_coordinates_are_shown_without_a_process() -> None:
    data = manifest(3)
    landscape = draw_landscape(data)
    assert landscape is not None
    assert landscape.map is None
    assert [(s.name, s.line, len(s.marks)) for s in landscape.slices] == [(n, "", 17) for n in ("tau", "beta", "ratio")]
    assert "Gaussian process" not in render_html(data)


@pytest.mark.parametrize("keep", [3, 16])
def test_too_few_or_equal_values_are_shown_without_a_process(keep: int) -> None:
    data = manifest(1)
    data["trials"] = data["trials"][: keep - 1]
    if keep == 16:
        for scored in (*data["trials"], data["anchors"][2]):
            scored["search"] = {**scored["search"], "value": 2.0}
    landscape = draw_landscape(data)
    assert landscape is not None
    assert [(s.line, s.band) for s in landscape.slices] == [("", "")]


def test_nothing_inside_the_space_gives_no_landscape() -> None:
    data = {**manifest(2), "trials": []}
    assert draw_landscape(data) is None
    assert "Along" not in render_html(data)


def test_a_value_that_is_not_finite_is_left_out() -> None:
    data = manifest(2)
    data["trials"][0]["search"]["value"] = None
    landscape = draw_landscape(data)
    assert landscape is not None
    assert len(landscape.slices[0].marks) == 16
