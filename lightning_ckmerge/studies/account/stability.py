"""How the coefficients change from search to search of a run. Nothing is evaluated: manifests hold all of it.

Letters: K snapshots, oldest first, the last one being the latest weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ckmerge.artifact.manifest import Manifest

Array = Any
NUM_PLACES = 4001


def age_profile(manifest: Manifest) -> Array:
    """Return how much of the merge is at most so old, at evenly spaced ages from 0 to the whole run.

    A mean's coefficient is spread over its steps; a point's lies at its own.
    """
    step = manifest["step"]
    age = np.linspace(0.0, 1.0, NUM_PLACES)
    total = np.zeros(NUM_PLACES)
    for snapshot, c in zip(manifest["snapshots"], manifest["coefficients"], strict=True):
        youngest = (step - snapshot["last_step"]) / step
        oldest = (step - snapshot["first_step"] + 1) / step if snapshot["kind"] == "mean" else youngest
        if oldest > youngest:
            total += c * np.clip((age - youngest) / (oldest - youngest), 0.0, 1.0)
        else:
            total += c * (age >= youngest)
    return total


def mean_age(manifest: Manifest) -> float:
    """Return the merge's mean age in steps: 0 for the latest weights."""
    ages = [
        manifest["step"] - (s["last_step"] if s["kind"] == "point" else (s["first_step"] - 1 + s["last_step"]) / 2)
        for s in manifest["snapshots"]
    ]
    return float(sum(c * a for c, a in zip(manifest["coefficients"], ages, strict=True)))


def shift(before: Manifest, after: Manifest) -> float:
    """Return how far the coefficients have moved between two searches, as a share of the run so far.

    It is the area between the two age profiles, the ages being shares of the run so far: Wasserstein's distance, which
    holds for coefficients below 0 too.
    """
    a, b = age_profile(before), age_profile(after)
    return float(np.abs(a - b).mean())


def searches(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return a row for each search, oldest first: what its merge is made of, and how far that moved since."""
    ordered = sorted(manifests, key=lambda m: m["step"])
    rows: list[dict[str, Any]] = []
    for i, manifest in enumerate(ordered):
        c_K: list[float] = manifest["coefficients"]
        coordinates: Mapping[str, float] | None = manifest["coordinates"]
        rows.append(
            {
                "step": manifest["step"],
                "status": manifest["verdict"]["status"],
                "winner": manifest["verdict"]["winner"],
                "num_snapshots": len(c_K),
                "latest": c_K[-1],
                "below_zero": float(sum(c for c in c_K if c < 0)),
                "mean_age": mean_age(manifest),
                "age_share": mean_age(manifest) / manifest["step"],
                "shift": shift(ordered[i - 1], manifest) if i else None,
                "coordinates": dict(coordinates) if coordinates else None,
            }
        )
    return rows
