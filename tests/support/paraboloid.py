"""An objective with a known optimum, scored in batches whose noise is the same for every candidate."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler

from lightning_ckmerge.core.objectives import Mode, Objective
from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, Space
from lightning_ckmerge.search.engine import Search
from lightning_ckmerge.search.problem import Half, KeepGoing, Problem
from lightning_ckmerge.search.stopping import Budget
from lightning_ckmerge.search.study import SearchStudy, make_sampler
from tests.support.segments import means, with_latest

SEGMENTS: tuple[Segment, ...] = with_latest(means([100] * 9))
OPTIMUM = Decay().coefficients({"tau": 150.0, "beta": 1.0}, SEGMENTS)


POINTS = tuple(Segment(kind="point", first_step=n * 100 + 1, last_step=n * 100 + 100) for n in range(3))


class HaltError(Exception):
    """Stands for a lost node."""


@dataclass
class Paraboloid:
    """The squared distance of the coefficients from the optimum.

    Args:
        sign: -1 for a metric of which more is better.
        noise: Standard deviation over batches, alike for all candidates.
        jitter: Standard deviation over batches of the paired difference of two candidates, per unit of distance.
        change: Turns a candidate's loss into what validation would have logged.
        metrics: Other logged metrics, from coefficients.
    """

    optimum_K: Sequence[float] = OPTIMUM
    sign: int = 1
    noise: float = 0.1
    jitter: float = 0.0
    batches: int = 20
    change: Callable[[Sequence[float], float], float] = lambda c_K, loss: loss
    metrics: Callable[[Sequence[float]], dict[str, float]] = lambda c_K: {}
    calls: list[tuple[float, ...]] = field(default_factory=list)
    scored_batches: int = 0

    def loss(self, c_K: Sequence[float]) -> float:
        """Return the loss without noise."""
        return sum((c - o) ** 2 for c, o in zip(c_K, self.optimum_K, strict=True))

    def num_batches(self, half: Half) -> int:
        return self.batches

    def __call__(self, c_K: Sequence[float], half: Half, keep_going: KeepGoing | None = None) -> Score:
        self.calls.append(tuple(c_K))
        shared, own = random.Random(half), random.Random(repr((half, tuple(c_K))))
        loss = self.change(c_K, self.loss(c_K))
        values_B: list[float] = []
        while len(values_B) < self.batches:
            noise = self.noise * shared.gauss(0, 1)
            if self.jitter:
                noise += self.jitter * loss**0.5 * own.gauss(0, 1)
            values_B.append(self.sign * (loss + noise))
            if keep_going is not None and not keep_going(values_B, [1.0] * len(values_B)):
                break
        self.scored_batches += len(values_B)
        value = sum(values_B) / len(values_B)
        return Score(
            value=value,
            metrics={"val_loss": value, **self.metrics(c_K)},
            values_B=tuple(values_B),
            sizes_B=(1.0,) * len(values_B),
            num_batches=len(values_B),
            complete=len(values_B) == self.batches,
        )


def make_search(
    evaluate: Any,
    storage: Path | str,
    *,
    space: Space | None = None,
    sampler: BaseSampler | None = None,
    budget: Budget | None = None,
    fingerprint: str = "",
    name: str = "search",
    mode: Mode = "min",
    others: Sequence[Objective] = (),
    **problem: Any,
) -> Search:
    """Return a search over ``SEGMENTS`` that has not run yet."""
    options = {
        "objectives": (Objective("loss", mode), *others),
        "segments_K": SEGMENTS,
        "n_trials": 12,
        "space": space or Decay(),
        **problem,
    }
    posed = Problem(**options)

    def open_study(latest: Score) -> SearchStudy:
        return SearchStudy(
            storage,
            name,
            sampler=make_sampler(sampler, 0),
            intervals=posed.space.coordinates(posed.segments_K),
            objectives=posed.objectives,
            fingerprint=f"{latest.value}{fingerprint}",
        )

    return Search(
        problem=posed,
        evaluate=evaluate,
        open_study=open_study,
        budget=budget or Budget(),
        agree=lambda function: function(),
    )


def halting(num_calls: int) -> Paraboloid:
    """Return an objective that is lost in its last call."""
    evaluate = Paraboloid()

    def change(c_K: Sequence[float], loss: float) -> float:
        if len(evaluate.calls) == num_calls:
            raise HaltError
        return loss

    evaluate.change = change
    return evaluate


def proposals(search: Search) -> list[tuple[str, dict[str, float] | None]]:
    """Return what the sampler asked for."""
    return [(t.candidate.name, t.candidate.coordinates) for t in search.trials]
