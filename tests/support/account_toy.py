"""An account of a merge of vectors, scored by any function of them: no Trainer, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.studies.account import figures
from lightning_ckmerge.studies.account.curvature import find_curvature
from lightning_ckmerge.studies.account.places import Places, Rows, measure, partition
from lightning_ckmerge.studies.account.stability import searches
from tests.support.outcomes import make_history

NAMES = ["embed.weight", "blocks.0.attn.weight", "blocks.1.mlp.weight"]
NUM_BATCHES = 12
SNAPSHOTS = [[0.0, 0.0, 4.0], [-1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
C_K = [0.0, 0.5, 0.5]


def bowl(w: Any) -> float:
    return 1.0 + float(np.square(w) @ np.array([1.0, 2.0, 3.0]))


def make_account(
    value: Callable[[Any], float],
    snapshots: list[list[float]],
    c_K: list[float],
    *,
    mode: Literal["min", "max"] = "min",
    monitor: str = "val_loss",
) -> dict[str, Any]:
    """Return the account of ``sum_k c_k snapshot_k``, each snapshot being three numbers, a tensor each."""
    manifest = {"coefficients": c_K}
    cell_of, cells = partition(NAMES, manifest)
    places = Places(cells, range(len(c_K)), has_merge=True)
    vectors = np.array(snapshots)
    sources = np.vstack([np.array(c_K) @ vectors, vectors])
    held = [{n: torch.tensor([v]) for n, v in zip(NAMES, s, strict=True)} for s in sources.tolist()]
    geometry = measure(held, cell_of, cells)
    measured = figures.Measured(monitor=monitor, mode=mode, half="confirm", num_batches=NUM_BATCHES)

    def score(rows: Rows) -> Score:
        w = np.array([rows[cell_of[n]] @ sources[:, i] for i, n in enumerate(NAMES)])
        v = value(w)
        # A share of a spread that all places have in common.
        values = tuple(v * (1 + 0.01 * ((7 * b) % NUM_BATCHES - 5.5)) for b in range(NUM_BATCHES))
        return Score(value=float(np.mean(values)), values_B=values, sizes_B=(1.0,) * NUM_BATCHES)

    plane_section, plane = figures.plane_section(places, geometry)
    sections = [
        figures.snapshots_section(places),
        figures.line_section(places),
        figures.parts_section(places, "groups"),
        figures.parts_section(places, "layers"),
        plane_section,
    ]
    scores = {"latest": score(places.latest()), "merge": score(places.merge())}
    scores |= {name: score(rows) for s in sections for name, rows in s.places.items()}
    records = [{"kind": "point", "first_step": 100 * k, "last_step": 100 * k} for k in range(1, len(c_K) + 1)]
    gain, interval = measured.gain(scores["merge"], scores["latest"])
    assert plane is not None
    found = {
        "snapshots": figures.snapshots_figure(places, scores, measured, records),
        "groups": figures.parts_figure(places, scores, measured, "groups", geometry),
        "layers": figures.parts_figure(places, scores, measured, "layers", geometry),
        "line": figures.line_figure(places, scores, measured, geometry),
        "plane": figures.plane_figure(plane, places, scores, measured, len(c_K)),
        "curvature": figures.curvature_figure(
            *(find_curvature(lambda v, h=h: h * v, 3) for h in (4.0, 1.0)),
            measured,
            2,  # type: ignore[misc]
        ),
        "importances": figures.importances_figure({"tau": 0.8, "beta": 0.2}, 20, 3),
        "stability": figures.stability_figure(searches(list(make_history().manifests.values())), 1),
    }
    return {
        "figures": found,
        "left_out": {"agreement": "No `predict` was given, which says how to get predictions."},
        "notes": [],
        "complete": True,
        "created": "2026-11-24T22:05:31+00:00",
        "step": 100 * len(c_K),
        "monitor": monitor,
        "mode": mode,
        "half": "confirm",
        "num_batches": NUM_BATCHES,
        "num_samples": 48.0,
        "gain": gain,
        "interval": interval,
        "values": {name: scores[name].value for name in ("latest", "merge")},
        "points": dict.fromkeys(scores),
    }
