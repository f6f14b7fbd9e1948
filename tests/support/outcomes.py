"""Searches, artifacts and histories of runs, made up but in every respect as real ones are built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ckmerge.artifact.history import History
from lightning_ckmerge.artifact.load import Artifact
from lightning_ckmerge.artifact.manifest import build_manifest
from lightning_ckmerge.artifact.publish import ArtifactStore
from lightning_ckmerge.artifact.timeline import timeline_record
from lightning_ckmerge.core.layout import find_aliases, tensor_spec
from lightning_ckmerge.core.objectives import Mode
from lightning_ckmerge.core.outcome import (
    Candidate,
    Cost,
    EvaluationRecord,
    Score,
    Scored,
    SearchOutcome,
    SnapshotRecord,
    Status,
    Verdict,
)

Publish = Callable[..., Artifact]
CREATED = "2026-11-24T22:05:31+00:00"
DIRPATH = Path("/data/lightning_logs/version_3/merges")
FILES = {"model.safetensors": {"bytes": 498_000_123, "sha256": "ef" * 32}}


LAST_STEPS = (512, 768, 896, 960, 1000)


def make_outcome(
    *,
    step: int = 1000,
    status: Status = "accepted",
    value: float = 2.0,
    gain: float = 0.05,
    monitor: str = "val_loss",
    mode: Mode = "min",
    winner_is_anchor: bool = False,
    warnings: tuple[str, ...] = (),
    others: Mapping[str, float] = MappingProxyType({}),
) -> SearchOutcome:
    """Return a search over five means and the latest weights, whose winner has ``value`` on the confirmation half.

    ``others`` are the winner's other metrics, which are higher by as much as the monitored one is worse.
    """
    sign = 1 if mode == "min" else -1

    def score(worse_by: float) -> Score:
        metrics = {monitor: value + sign * worse_by, **{name: v + worse_by for name, v in others.items()}}
        return Score(value=value + sign * worse_by, metrics=metrics, num_batches=8)

    latest = Scored(
        candidate=Candidate(name="latest", coefficients_K=(0, 0, 0, 0, 0, 1)), search=score(0.06), confirm=score(gain)
    )
    uniform = Scored(
        candidate=Candidate(name="uniform-4", coefficients_K=(0, 0.25, 0.25, 0.25, 0.25, 0)),
        search=score(0.01),
        confirm=score(0.0 if winner_is_anchor else 0.012),
    )
    ema = Scored(candidate=Candidate(name="ema-40", coefficients_K=(0, 0, 0, 0.2, 0.8, 0)), search=score(0.034))
    trials = tuple(
        Scored(
            candidate=Candidate(
                name=f"trial-{i}",
                coefficients_K=(-0.1, 0.3 - 0.01 * i, 0.2, 0.2, 0.4 + 0.01 * i, 0),
                coordinates={"tau": 30.0 * (i + 1), "beta": 0.2 * i},
            ),
            search=Score(
                value=value + sign * (0.3 * math.exp(-i) - 0.004 + 0.003 * (i % 3)),
                num_batches=8 - i % 2,
                complete=i != 3,
            ),
            confirm=score(0) if i == 6 and not winner_is_anchor else None,
            feasible=i != 4,
        )
        for i in range(8)
    )
    return SearchOutcome(
        step=step,
        monitor=monitor,
        mode=mode,
        space="decay",
        snapshots_K=(
            *(
                SnapshotRecord(
                    kind="mean", first_step=first + 1, last_step=last, num_updates=last - first, sha256="ab" * 32
                )
                for first, last in zip((0, *LAST_STEPS[:-1]), LAST_STEPS, strict=True)
            ),
            SnapshotRecord(kind="point", first_step=1000, last_step=1000, num_updates=1, sha256=None),
        ),
        winner=uniform if winner_is_anchor else trials[6],
        anchors=(latest, uniform, ema),
        trials=trials,
        verdict=Verdict(
            status=status,
            gain=gain,
            interval=None if status == "unconfirmed" else (round(gain - 0.009, 6), round(gain + 0.009, 6)),
            num_differences=8,
            best_anchor="uniform-4",
            gain_over_best_anchor=0.012,
            interval_over_best_anchor=None if status == "unconfirmed" else (0.004, 0.02),
            equivalent_steps=310 if status == "accepted" else None,
            sentence=f"The verdict on {monitor} is: {status}.",
            warnings=warnings,
        ),
        evaluation=EvaluationRecord(
            search_batches=(8,),
            confirm_batches=(8,),
            search_samples=256.0,
            confirm_samples=250.0,
            fingerprint="cd" * 32,
        ),
        cost=Cost(
            seconds={"anchors": 2.0, "trials": 7.5, "confirm": 1.5, "other": 0.3},
            share_of_training=0.021,
            num_batches=93,
            num_batches_saved=4,
        ),
    )


class LocalWeights:
    """Weights of which this process holds all: dense tensors by name, with any strides."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: tensor_spec(t.shape, t.dtype) for name, t in tensors.items()}
        self.aliases = find_aliases(tensors)

    def gather(self, name: str) -> Tensor:
        return self._tensors[name]


class TiedModel(nn.Module):
    """Tied weights, BatchNorm's buffers (one of them integer), a mask of ``-inf``, and extra state."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 6, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("a merge holds no extra state")


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


def publisher(dirpath: Path) -> Publish:
    """Return a function that publishes made-up searches of one run in ``dirpath``.

    Each has a model's weights, unless ``weights`` says otherwise.
    """

    def publish(
        *,
        save_top_k: int = -1,
        max_shard_size: int = 1 << 30,
        weights: Any = "default",
        extras: Any = (),
        **kwargs: Any,
    ) -> Artifact:
        mode = kwargs.get("mode", "min")
        store = ArtifactStore(dirpath, mode=mode, save_top_k=save_top_k, max_shard_size=max_shard_size)
        if weights == "default":
            weights = tensors_of(TiedModel())
        merged = None if weights is None else LocalWeights(weights)
        return store.publish(build_manifest(make_outcome(**kwargs)), merged, extras=extras)

    return publish


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
