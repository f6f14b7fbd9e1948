"""The history of a run, made up but in every respect as a real one is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_ckmerge.artifact.history import History
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.timeline import timeline_record
from lightning_ckmerge.core.outcome import Status
from tests.artifact.outcomes import make_outcome

CREATED = "2026-11-24T22:05:31+00:00"
DIRPATH = Path("/data/lightning_logs/version_3/merges")
FILES = {"model.safetensors": {"bytes": 498_000_123, "sha256": "ef" * 32}}


def make_history(
    statuses: tuple[Status, ...] = ("unconfirmed", "accepted", "rejected", "accepted"), *, monitor: str = "val_loss"
) -> History:
    """Return a run with a search every 1000 steps and a validation every 250; the best is the last accepted one."""
    timeline: list[dict[str, Any]] = []
    manifests = {}
    for i, status in enumerate(statuses, start=1):
        step = 1000 * i
        gain = -0.03 if status == "rejected" else 0.05 + 0.01 * i
        outcome = make_outcome(step=step, status=status, gain=gain, value=2.0 + 3.0 * math.exp(-i), monitor=monitor)
        interval = None if status == "unconfirmed" else (gain - 0.02, gain + 0.02)
        verdict = replace(outcome.verdict, interval=interval)
        manifest = {**build_manifest(replace(outcome, verdict=verdict)), "files": FILES, "created": CREATED}
        validation = [(s, 2.05 + 6.0 * math.exp(-s / 900)) for s in range(step - 750, step + 1, 250)]
        name = f"step={step:09d}"
        timeline.append(timeline_record(manifest, name, validation))
        manifests[name] = manifest
    accepted = [r["artifact"] for r in timeline if r["status"] == "accepted"]
    return History(
        dirpath=DIRPATH,
        timeline=timeline,
        manifests=manifests,
        best=accepted[-1] if accepted else None,
    )
