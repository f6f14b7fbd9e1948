"""The weights that an account scores: each a weighted sum of the merge, the kept snapshots and the latest weights.

Letters: K snapshots of the manifest, oldest first, the last one being the latest weights; S sources that can be mixed:
the merge, where its weights are kept, the kept snapshots, and the latest weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ckmerge.artifact.manifest import Manifest, coefficients_of
from lightning_ckmerge.core.spaces.groups import assign_groups
from lightning_ckmerge.errors import SnapshotError

Array = Any
# S numbers for each cell; they sum to 1 where they stand for weights, and to 0 for a difference of two.
Rows = dict[str, Array]
OUTSIDE = "outside layers"
MAX_LAYERS = 12
# A snapshot that is nearly the whole merge leaves no others to deal its share out to.
SMALLEST_REST = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Tensors that an account never tells apart.

    Args:
        group: Their kind: embeddings, attention, mlp, norms, head or other.
        layer: Their layer, such as ``layer 3``, or ``outside layers``.
        c_K: The merge's coefficients for them.
        num_tensors: How many they are.
    """

    group: str
    layer: str
    c_K: tuple[float, ...]
    num_tensors: int


def partition(names: Sequence[str], manifest: Manifest) -> tuple[dict[str, str], dict[str, Cell]]:
    """Return tensor name -> cell's name, and the cells by name: kind by layer by the merge's own groups.

    Args:
        names: The model's tensors.
        manifest: Its coefficients, and those of its groups.
    """
    kind_of, layer_of, c_of = assign_groups(names, "kind"), layers(names), coefficients_of(manifest)
    rows: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for name in names:
        rows.setdefault((kind_of[name], layer_of[name], tuple(c_of(name))), []).append(name)
    cell_of, cells = {}, {}
    for i, ((group, layer, c_K), members) in enumerate(rows.items()):
        key = f"{group}/{layer}/{i}"
        cells[key] = Cell(group=group, layer=layer, c_K=c_K, num_tensors=len(members))
        cell_of.update(dict.fromkeys(members, key))
    return cell_of, cells


def layers(names: Sequence[str]) -> dict[str, str]:
    """Return tensor name -> its layer, the first number in the name; of deep models a band of layers.

    >>> layers(["h.0.attn.weight", "h.1.attn.weight", "wte.weight"])
    {'h.0.attn.weight': 'layer 0', 'h.1.attn.weight': 'layer 1', 'wte.weight': 'outside layers'}
    """
    numbers = {n: int(found[1]) for n in names if (found := re.search(r"\.(\d+)\.", n))}
    present = sorted(set(numbers.values()))
    num_bands = min(MAX_LAYERS, len(present))
    bands: dict[int, list[int]] = {}
    for i, number in enumerate(present):
        bands.setdefault(i * num_bands // len(present), []).append(number)
    told = {n: f"layer {b[0]}" if len(b) == 1 else f"layers {b[0]}-{b[-1]}" for b in bands.values() for n in b}
    return {name: told[numbers[name]] if name in numbers else OUTSIDE for name in names}


class Places:
    """Mixes sources.

    Args:
        cells: The model's tensors, by cell.
        kept: Places in the manifest of the snapshots that are kept, ascending; the latest weights always are.
        has_merge: Whether the merge's own weights are kept, and are the first source.

    Raises:
        SnapshotError: The merge can neither be read nor mixed.
    """

    def __init__(self, cells: Mapping[str, Cell], kept: Sequence[int], *, has_merge: bool) -> None:
        self.cells = cells
        self.kept = tuple(kept)
        self.has_merge = has_merge
        self.num_sources = len(kept) + has_merge
        lacking = {k for cell in cells.values() for k, c in enumerate(cell.c_K) if c} - set(kept)
        if lacking and not has_merge:
            raise SnapshotError(
                "an account needs the merge: its weights, or each snapshot that counts, got a record without weights, "
                f"and {len(lacking)} of its snapshots are no longer kept. Explain an artifact with weights, or explain "
                "sooner after its search."
            )

    def snapshot(self, k: int) -> Rows:
        """Return one of the manifest's snapshots, which must be kept."""
        row = np.zeros(self.num_sources)
        row[self.has_merge + self.kept.index(k)] = 1.0
        return dict.fromkeys(self.cells, row)

    def latest(self) -> Rows:
        """Return the latest weights."""
        return self.snapshot(self.kept[-1])

    def merge(self) -> Rows:
        """Return the merge."""
        if self.has_merge:
            row = np.zeros(self.num_sources)
            row[0] = 1.0
            return dict.fromkeys(self.cells, row)
        return {key: np.array([cell.c_K[k] for k in self.kept]) for key, cell in self.cells.items()}

    def mean(self) -> Rows:
        """Return the plain mean of all kept snapshots, the latest weights among them."""
        return mixed([(1 / len(self.kept), self.snapshot(k)) for k in self.kept])

    def without(self, k: int) -> Rows | None:
        """Return the merge without a snapshot, whose share is dealt out to the others in proportion to theirs.

        ``None`` where there are no others. With coefficient ``c`` it is ``(merge - c * snapshot) / (1 - c)``: no other
        snapshot needs to be kept.
        """
        if any(abs(1 - cell.c_K[k]) < SMALLEST_REST for cell in self.cells.values()):
            return None
        merge, own = self.merge(), self.snapshot(k)
        return {key: (merge[key] - c.c_K[k] * own[key]) / (1 - c.c_K[k]) for key, c in self.cells.items()}

    def counts(self, k: int) -> bool:
        """Whether a snapshot has a coefficient other than 0 anywhere."""
        return any(cell.c_K[k] != 0 for cell in self.cells.values())

    def swapped(self, base: Rows, other: Rows, chosen: Callable[[Cell], bool], share: float = 1.0) -> Rows:
        """Return ``base`` with the chosen cells moved towards ``other`` by ``share``."""
        return {
            key: (1 - share) * base[key] + share * other[key] if chosen(cell) else base[key]
            for key, cell in self.cells.items()
        }


def mixed(parts: Sequence[tuple[float, Rows]]) -> Rows:
    """Return a weighted sum."""
    return {key: sum(weight * rows[key] for weight, rows in parts) for key in parts[0][1]}


class Geometry:
    """Lengths and angles between mixtures, over all parameters, or over some cells.

    Args:
        inner_SS: For each cell the inner products of the sources' differences from the last one, ``(S, S)``.
    """

    def __init__(self, inner_SS: Mapping[str, Array]) -> None:
        self._inner_SS = inner_SS

    def dot(self, a: Rows, b: Rows, keys: Sequence[str] | None = None) -> float:
        """Return the inner product of two differences of mixtures."""
        keys = list(self._inner_SS) if keys is None else keys
        return float(sum(a[key] @ self._inner_SS[key] @ b[key] for key in keys))

    def distance(self, a: Rows, b: Rows, keys: Sequence[str] | None = None) -> float:
        """Return the Euclidean distance between two mixtures."""
        d = mixed([(1.0, a), (-1.0, b)])
        return float(max(0.0, self.dot(d, d, keys)) ** 0.5)


def measure(sources: Sequence[Mapping[str, Tensor]], cell_of: Mapping[str, str], cells: Mapping[str, Cell]) -> Geometry:
    """Return the geometry of some sources, a tensor at a time.

    Args:
        sources: S of them, each with every parameter.
        cell_of: Parameter's name -> cell; tensors that are no parameters are left out.
        cells: All cells, of which some may hold no parameter.
    """
    inner_SS = {key: np.zeros((len(sources), len(sources))) for key in cells}
    for name, key in cell_of.items():
        flat = [source[name].detach().reshape(-1).to("cpu", torch.float64) for source in sources]
        d_SP = torch.stack([tensor - flat[-1] for tensor in flat])
        inner_SS[key] += (d_SP @ d_SP.T).numpy()
    return Geometry(inner_SS)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """The plane through three mixtures, with the first one at the origin and the second on the first axis.

    Args:
        origin: The first mixture.
        edges: Differences of the other two from it.
        x_axis: How the unit vectors are made of the two edges: ``(1 / |u|, 0)``.
        y_axis: Likewise.
        corners: The three mixtures' places.

    Source:
        Garipov et al. 2018, arXiv:1802.10026, appendix A.1: an orthonormal basis, so that distances are what they seem.
    """

    origin: Rows
    edges: tuple[Rows, Rows]
    x_axis: tuple[float, float]
    y_axis: tuple[float, float]
    corners: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

    def at(self, x: float, y: float) -> Rows:
        """Return the mixture at a place, in units of distance."""
        a, b = (x * along + y * across for along, across in zip(self.x_axis, self.y_axis, strict=True))
        return mixed([(1.0, self.origin), (a, self.edges[0]), (b, self.edges[1])])

    def grid(self, size: int, margin: float = 0.35) -> tuple[list[float], list[float]]:
        """Return ``size`` columns and rows that hold the corners, with a margin as a share of their extent."""

        def spread(values: Sequence[float]) -> list[float]:
            low, high = min(values), max(values)
            room = margin * (high - low)
            return [float(v) for v in np.linspace(low - room, high + room, size)]

        return spread([c[0] for c in self.corners]), spread([c[1] for c in self.corners])


# Of the longer edge: flatter triangles are lines.
MIN_HEIGHT = 1e-3


def make_plane(origin: Rows, second: Rows, third: Rows, geometry: Geometry) -> Plane | None:
    """Return the plane through three mixtures; ``None`` where they lie on one line."""
    u, v = mixed([(1.0, second), (-1.0, origin)]), mixed([(1.0, third), (-1.0, origin)])
    length = geometry.dot(u, u) ** 0.5
    if length == 0:
        return None
    along = geometry.dot(u, v) / length
    height = max(0.0, geometry.dot(v, v) - along**2) ** 0.5
    if height < MIN_HEIGHT * max(length, abs(along)):
        return None
    return Plane(
        origin=origin,
        edges=(u, v),
        x_axis=(1 / length, 0.0),
        y_axis=(-along / (height * length), 1 / height),
        corners=((0.0, 0.0), (length, 0.0), (along, height)),
    )
