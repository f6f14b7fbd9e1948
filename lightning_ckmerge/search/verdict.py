"""The verdict: does the merge gain on data that the search did not see?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Gain, Status, Trial, Verdict
from lightning_ckmerge.search.interval import score_gain
from lightning_ckmerge.search.sentence import verdict_told
from lightning_ckmerge.search.slope import Progress


def reach_verdict(
    winner: Trial,
    latest: Trial,
    best_anchor: Trial,
    *,
    objectives: Sequence[Objective],
    front: Sequence[Trial] = (),
    progress: Progress | None = None,
    warnings: tuple[str, ...] = (),
) -> Verdict:
    """Compare the winner with the latest weights and the best anchor, on the confirmation half.

    Picking the best of many flatters it, so the search half, on which it was picked, has no say here.

    Args:
        winner: The best candidate on the search half.
        latest: The latest weights.
        best_anchor: The best on the search half of the known merges, the latest weights included.
        objectives: The monitored metrics, at least one. Of several, a gain in one must be certain, and a loss in none;
            the intervals of all together hold 95 %.
        front: The Pareto front, where there are several.
        progress: The run so far, from which a gain is told in training steps.
        warnings: What else people should know.
    """
    gains = [_gain(winner, latest, i, objectives) for i in range(len(objectives))]
    first = gains[0]
    anchor_gain, anchor_interval = paired_gain(winner, best_anchor, objectives[0].sign, num_intervals=len(objectives))
    status = _status(winner, latest, gains)
    is_certain = status == "accepted" and first.interval is not None and first.interval[0] > 0
    verdict = Verdict(
        status=status,
        gain=first.gain,
        interval=first.interval,
        num_differences=_num_differences(winner, latest),
        best_anchor=best_anchor.candidate.name,
        gain_over_best_anchor=anchor_gain,
        interval_over_best_anchor=anchor_interval,
        equivalent_steps=progress.steps_worth(first.gain, objectives[0].sign) if progress and is_certain else None,
        others=tuple(gains[1:]),
        front=tuple(t.candidate.name for t in front),
        sentence="",
        warnings=warnings,
    )
    return replace(verdict, sentence=verdict_told(verdict, gains, winner, latest, best_anchor))


def paired_gain(
    trial: Trial, other: Trial, sign: int, *, objective: int = 0, num_intervals: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``trial`` is than ``other`` on the confirmation half, and the 95 % interval.

    Without per-batch values, or with fewer than five batches, there is no interval. Without a confirmation half the
    gain is the search half's.

    Args:
        trial: One candidate.
        other: Another.
        sign: 1 if lower values are better, -1 if higher ones are.
        objective: By which of the monitored metrics.
        num_intervals: Of how many intervals that hold 95 % together this is one.
    """
    if trial is other:
        return 0.0, None
    if trial.confirm is None or other.confirm is None:
        ours, theirs = (t.search.objectives[objective] for t in (trial, other))
        return sign * (theirs.value - ours.value), None
    ours, theirs = (c.objectives[objective] for c in (trial.confirm, other.confirm))
    return score_gain(ours, theirs, sign, num_intervals=num_intervals)


def _gain(trial: Trial, latest: Trial, index: int, objectives: Sequence[Objective]) -> Gain:
    objective = objectives[index]
    gain, interval = paired_gain(trial, latest, objective.sign, objective=index, num_intervals=len(objectives))
    value = (trial.confirm or trial.search).objectives[index].value
    return Gain(monitor=objective.monitor, mode=objective.mode, value=value, gain=gain, interval=interval)


def _status(winner: Trial, latest: Trial, gains: Sequence[Gain]) -> Status:
    intervals = [g.interval for g in gains]
    # No amount of data makes a gain of a value that is not finite.
    if winner is latest or not all(math.isfinite(g.value) for g in gains):
        return "rejected"
    if any(i is not None and i[1] < 0 for i in intervals):
        return "rejected"
    is_certain = all(i is not None for i in intervals) and any(i is not None and i[0] > 0 for i in intervals)
    return "accepted" if is_certain else "unconfirmed"


def _num_differences(winner: Trial, latest: Trial) -> int | None:
    if winner is latest or winner.confirm is None or latest.confirm is None or not winner.confirm.values_B:
        return None
    return len(winner.confirm.values_B)
