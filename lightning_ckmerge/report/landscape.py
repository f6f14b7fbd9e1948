"""The search along its coordinates: a slice for each of them, and a map where there are two.

Letters: N candidates, D coordinates; x in the unit cube.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_ckmerge.artifact.manifest import Manifest
from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.report.axes import BOTTOM, TOP, Axis, Tick, horizontal, vertical
from lightning_ckmerge.report.charts import Mark, Shape, is_winner, look, mark, short, value_axis
from lightning_ckmerge.report.text import number

if TYPE_CHECKING:
    from lightning_ckmerge.search.gaussian_process import Array, GaussianProcess

NUM_POINTS = 61
NUM_COLUMNS, NUM_ROWS = 48, 28
NUM_LEVELS = 10
# Beyond this a coordinate is drawn by its logarithm; the manifest does not say how it was searched.
LOG_RATIO = 20
# With more coordinates a slice through one point says little about the rest.
MAX_FITTED = 2
# Half the width of a 95 % band, in standard deviations.
BAND = 1.96


@dataclass(frozen=True, kw_only=True)
class SliceChart:
    """One coordinate; ``line`` and ``band`` are an SVG path of the process's mean and 95 % band, empty without one."""

    name: str
    marks: list[Mark]
    line: str
    band: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A stretch of one row of the map; ``level`` is 0 for the worst values and ``NUM_LEVELS - 1`` for the best."""

    x: float
    y: float
    width: float
    height: float
    level: int


@dataclass(frozen=True, kw_only=True)
class MapChart:
    """The process's mean over two coordinates; ``best`` and ``worst`` are the values of its colours' ends."""

    names: tuple[str, str]
    cells: list[Cell]
    marks: list[Mark]
    best: str
    worst: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The candidates' account of the coordinates; ``fixed`` places the slices."""

    slices: list[SliceChart]
    map: MapChart | None
    fixed: str


def draw_landscape(manifest: Manifest) -> Landscape | None:
    """Return slices and map; ``None`` where nothing was scored inside the space."""
    values = value_axis(manifest)
    scored = [c for c in (*manifest["anchors"], *manifest["trials"]) if c["coordinates"]]
    scored = [c for c in scored if c["search"]["value"] is not None]
    if values is None or len(scored) < 2:
        return None
    names = list(scored[0]["coordinates"])
    axes_D = [_axis([c["coordinates"][n] for c in scored]) for n in names]
    sign = sign_of(manifest["mode"])
    centre = _centre(manifest, scored, sign)
    z_ND = np.array([[c["coordinates"][n] for n in names] for c in scored])
    # As on the other charts, a value off the scale counts as lying on its rim: one wild value would drown all others.
    y_N = np.clip([c["search"]["value"] for c in scored], values.low, values.high)
    process = _fit(axes_D, z_ND, y_N, sign) if len(names) <= MAX_FITTED else None
    z_D = [centre["coordinates"][n] for n in names]
    at_D = np.array([a.share(z) for a, z in zip(axes_D, z_D, strict=True)])
    return Landscape(
        slices=[_slice(d, names[d], axes_D[d], values, scored, process, at_D, manifest) for d in range(len(names))],
        map=_map((names[0], names[1]), axes_D, scored, process, sign, manifest)
        if process and len(names) == 2
        else None,
        fixed=", ".join(f"{n} {number(z, '.4g')}" for n, z in zip(names, z_D, strict=True)),
    )


def _fit(axes_D: list[Axis], z_ND: Array, y_N: Array, sign: int) -> GaussianProcess | None:
    """Return the process that the sampler fits to such values; ``None`` for too few or equal ones."""
    # A page without a process needs neither Optuna nor PyTorch.
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.trial import create_trial

    from lightning_ckmerge.search.gaussian_process import GaussianProcess

    num, dims = z_ND.shape
    if num < dims + 3 or np.ptp(y_N) == 0:
        return None
    distributions: dict[str, BaseDistribution] = {
        str(d): FloatDistribution(axis.low, axis.high, log=axis.log) for d, axis in enumerate(axes_D)
    }
    trials = [
        create_trial(params={str(d): float(z) for d, z in enumerate(z_D)}, distributions=distributions, value=float(y))
        for z_D, y in zip(z_ND, y_N, strict=True)
    ]
    return GaussianProcess(trials, distributions, sign)


def _axis(values: list[float]) -> Axis:
    low, high = min(values), max(values)
    return horizontal(low, high, log=low > 0 and high / low > LOG_RATIO)


def _centre(manifest: Manifest, scored: list[dict[str, Any]], sign: int) -> dict[str, Any]:
    """The winner, or the best candidate inside the space where an anchor outside it won."""
    winner = [c for c in scored if c["name"] == manifest["verdict"]["winner"]]
    return winner[0] if winner else min(scored, key=lambda c: sign * c["search"]["value"])


def _marks(scored: list[dict[str, Any]], manifest: Manifest) -> list[tuple[dict[str, Any], Shape]]:
    anchors = {a["name"] for a in manifest["anchors"]}
    return [(c, "diamond" if c["name"] in anchors else "dot") for c in scored]


def _slice(
    d: int,
    name: str,
    axis: Axis,
    y: Axis,
    scored: list[dict[str, Any]],
    process: GaussianProcess | None,
    at_D: Array,
    manifest: Manifest,
) -> SliceChart:
    line = band = ""
    if process is not None:
        x_MD = np.tile(at_D, (NUM_POINTS, 1))
        x_MD[:, d] = np.linspace(0, 1, NUM_POINTS)
        mean_M, deviation_M = process.predict(x_MD)
        pixels = [axis.at(axis.value(share)) for share in x_MD[:, d]]
        above = [(x, y.clipped(v)) for x, v in zip(pixels, mean_M + BAND * deviation_M, strict=True)]
        below = [(x, y.clipped(v)) for x, v in zip(pixels, mean_M - BAND * deviation_M, strict=True)]
        line = path([(x, y.clipped(v)) for x, v in zip(pixels, mean_M, strict=True)])
        band = path([*above, *reversed(below)]) + "Z"
    return SliceChart(
        name=name,
        marks=[mark(c, axis.at(c["coordinates"][name]), y, manifest, shape) for c, shape in _marks(scored, manifest)],
        line=line,
        band=band,
        x_ticks=axis.ticks(5, short),
        y_ticks=y.ticks(5, short),
    )


def _map(
    names: tuple[str, str],
    axes_D: list[Axis],
    scored: list[dict[str, Any]],
    process: GaussianProcess,
    sign: int,
    manifest: Manifest,
) -> MapChart:
    x = axes_D[0]
    y = vertical(axes_D[1].low, axes_D[1].high, log=axes_D[1].log)
    columns, rows = (np.arange(NUM_COLUMNS) + 0.5) / NUM_COLUMNS, (np.arange(NUM_ROWS) + 0.5) / NUM_ROWS
    mean_RC = process.predict(np.array([(c, r) for r in rows for c in columns]))[0].reshape(NUM_ROWS, NUM_COLUMNS)
    badness_RC = sign * mean_RC
    # Quantiles: the optimum matters most, and it fills a small part of the range.
    edges = np.quantile(badness_RC, np.linspace(0, 1, NUM_LEVELS + 1)[1:-1])
    levels_RC = NUM_LEVELS - 1 - np.searchsorted(edges, badness_RC)
    best, worst = (sign * float(v) for v in (badness_RC.min(), badness_RC.max()))
    marks = []
    for candidate, usual in _marks(scored, manifest):
        z, (shape, hint) = candidate["coordinates"], look(candidate, usual)
        place = {"x": x.at(z[names[0]]), "y": y.at(z[names[1]])}
        marks.append(Mark(**place, shape=shape, winner=is_winner(candidate, manifest), hint=hint))
    return MapChart(
        names=names,
        cells=_cells(levels_RC, x, y),
        marks=marks,
        best=number(best),
        worst=number(worst),
        x_ticks=x.ticks(5, short),
        y_ticks=y.ticks(5, short),
    )


def _cells(levels_RC: Any, x: Axis, y: Axis) -> list[Cell]:
    """Neighbours of one level in a row become one rectangle."""
    width, height = (x.end - x.start) / NUM_COLUMNS, (BOTTOM - TOP) / NUM_ROWS
    cells = []
    for row, levels_C in enumerate(levels_RC.tolist()):
        column = 0
        for level, run in itertools.groupby(levels_C):
            length = len(list(run))
            left, top = x.start + column * width, y.start - (row + 1) * height
            cells.append(Cell(x=left, y=top, width=length * width, height=height, level=level))
            column += length
    return cells


def path(points: list[tuple[float, float]]) -> str:
    """Return an SVG path through ``points``.

    >>> path([(0, 1), (2.5, 3)])
    'M0.0 1.0L2.5 3.0'
    """
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points if math.isfinite(x) and math.isfinite(y))
