"""A search's outcome, made up but in every respect as a real one is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

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
