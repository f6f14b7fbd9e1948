"""The verdict: whether the merge gains on unseen data, in words, and how many training steps the gain is worth.

All numbers of its sentences stand in the manifest. Letters: N points of a curve of validation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy.special import stdtrit  # type: ignore[import-untyped]

from lightning_ckmerge.core.objectives import Objective
from lightning_ckmerge.core.outcome import Gain, Score, Scored, Status, Verdict
from lightning_ckmerge.core.wording import change_told, value_told
from lightning_ckmerge.search.interval import CONFIDENCE, MIN_CONFIRM_BATCHES, MOST_TIMES, batches_needed, score_gain

Point = tuple[int, float]
# The slope is that of a line through the last third of the run. Curves of training bend, so the line is steeper than
# the curve's end, and a gain is worth more steps than it says.
RECENT_SHARE = 1 / 3
MIN_POINTS = 3
# Half the interval's width, as a share of the slope: beyond it, "about 300 steps" would be anything from 200 to 600.
MAX_MARGIN = 0.5


def reach_verdict(
    winner: Scored,
    latest: Scored,
    best_anchor: Scored,
    *,
    objectives: Sequence[Objective],
    front: Sequence[Scored] = (),
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
        warnings: Further notes for people.
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
    scored: Scored, other: Scored, sign: int, *, objective: int = 0, num_intervals: int = 1
) -> tuple[float, tuple[float, float] | None]:
    """Return how much better ``scored`` is than ``other`` on the confirmation half, and the 95 % interval.

    Without per-batch values, or with fewer than five batches, there is no interval. Without a confirmation half the
    gain is the search half's.

    Args:
        scored: One candidate.
        other: Another.
        sign: 1 if lower values are better, -1 if higher ones are.
        objective: By which of the monitored metrics.
        num_intervals: Of how many intervals that hold 95 % together this is one.
    """
    if scored is other:
        return 0.0, None
    if scored.confirm is None or other.confirm is None:
        ours, theirs = (t.search.objectives[objective] for t in (scored, other))
        return sign * (theirs.value - ours.value), None
    ours, theirs = (c.objectives[objective] for c in (scored.confirm, other.confirm))
    return score_gain(ours, theirs, sign, num_intervals=num_intervals)


def _gain(scored: Scored, latest: Scored, index: int, objectives: Sequence[Objective]) -> Gain:
    objective = objectives[index]
    gain, interval = paired_gain(scored, latest, objective.sign, objective=index, num_intervals=len(objectives))
    value = (scored.confirm or scored.search).objectives[index].value
    return Gain(monitor=objective.monitor, mode=objective.mode, value=value, gain=gain, interval=interval)


def _status(winner: Scored, latest: Scored, gains: Sequence[Gain]) -> Status:
    intervals = [g.interval for g in gains]
    # No amount of data makes a gain of a value that is not finite.
    if winner is latest or not all(math.isfinite(g.value) for g in gains):
        return "rejected"
    if any(i is not None and i[1] < 0 for i in intervals):
        return "rejected"
    is_certain = all(i is not None for i in intervals) and any(i is not None and i[0] > 0 for i in intervals)
    return "accepted" if is_certain else "unconfirmed"


def _num_differences(winner: Scored, latest: Scored) -> int | None:
    if winner is latest or winner.confirm is None or latest.confirm is None or not winner.confirm.values_B:
        return None
    return len(winner.confirm.values_B)


def verdict_told(verdict: Verdict, gains: Sequence[Gain], winner: Scored, latest: Scored, best_anchor: Scored) -> str:
    """Return the sentences of a verdict.

    Args:
        verdict: All of it but the sentence.
        gains: One for each monitored metric.
        winner: The best candidate on the search half.
        latest: The latest weights.
        best_anchor: The best of the known merges on the search half.
    """
    name = winner.candidate.name
    if winner is latest:
        return _nothing_found(gains, latest)
    if broken := [g.monitor for g in gains if not math.isfinite(g.value)]:
        return f"Merging does not help: {broken[0]} of {name} is not finite on unseen batches."
    anchor = _told_anchor(verdict, winner, best_anchor)
    changes = _changes(gains, winner, latest, anchor) + _place(verdict, winner, latest)
    if verdict.status == "rejected":
        return f"Merging does not help: {name} {changes}."
    if verdict.status == "unconfirmed":
        return f"Unconfirmed: merging {changes}. {_remedy(verdict, gains, winner, latest)}"
    of_front = f" The merge is {name}, of a Pareto front of {len(verdict.front)}." if verdict.others else ""
    return f"Merging {changes}.{_steps_worth(verdict)}{of_front}{_anchor(anchor, winner, latest)}"


def _nothing_found(gains: Sequence[Gain], latest: Scored) -> str:
    values = [f"{g.monitor} of {value_told(o.value)}" for g, o in zip(gains, latest.search.objectives, strict=True)]
    found = "no candidate beats" if len(gains) == 1 else "no merge is a better compromise than"
    return f"Merging does not help: {found} the latest weights' {' and '.join(values)} on the search half."


def _changes(gains: Sequence[Gain], winner: Scored, latest: Scored, anchor: Scored | None) -> str:
    others = [anchor.confirm.value] if anchor is not None and anchor.confirm is not None else []
    told = [_change(g, i, winner, latest, others) for i, g in enumerate(gains)]
    if len(told) == 1:
        change, interval = told[0]
        return f"{change}; 95 % interval {interval}" if interval else change
    parts = [f"{change} ({interval})" if interval else change for change, interval in told]
    together = ", 95 % intervals for all together" if any(interval for _, interval in told) else ""
    return " and ".join(parts) + together


def _change(gain: Gain, index: int, winner: Scored, latest: Scored, others: Sequence[float] = ()) -> tuple[str, str]:
    before, after = (score.objectives[index] for score in _compared(winner, latest))
    # A metric that is negative on some batches lies around zero: a share of it says nothing.
    by_share = min(before.values_B or (0.0,)) >= 0
    return change_told(
        gain.monitor, gain.mode, before.value, after.value, gain.interval, by_share=by_share, others=others
    )


def _compared(winner: Scored, latest: Scored) -> tuple[Score, Score]:
    """Return the scores of the latest weights and of the winner, on the confirmation half if both have one."""
    if winner.confirm is None or latest.confirm is None:
        return latest.search, winner.search
    return latest.confirm, winner.confirm


def _place(verdict: Verdict, winner: Scored, latest: Scored) -> str:
    if winner.confirm is None or latest.confirm is None:
        return ", on the batches that chose it"
    if verdict.num_differences is None:
        return ", on unseen batches"
    of_blocks = "blocks of " if _in_blocks(latest, 0) else ""
    return f", on {verdict.num_differences} {of_blocks}unseen batches"


def _steps_worth(verdict: Verdict) -> str:
    if verdict.equivalent_steps is None:
        return ""
    what = "the first" if verdict.others else "as much"
    return f" About {verdict.equivalent_steps} further training steps at the current slope would gain {what}."


def _told_anchor(verdict: Verdict, winner: Scored, best_anchor: Scored) -> Scored | None:
    """The best merge that needs no search, if there is one and an accepted verdict tells it."""
    is_news = best_anchor is not winner and best_anchor.candidate.name != "latest" and not verdict.others
    return best_anchor if is_news and verdict.status == "accepted" and best_anchor.confirm is not None else None


def _anchor(anchor: Scored | None, winner: Scored, latest: Scored) -> str:
    if anchor is None or anchor.confirm is None:
        return ""
    before, after = (score.value for score in _compared(winner, latest))
    value = anchor.confirm.value
    return f" The best anchor, {anchor.candidate.name}, scores {value_told(value, (before, after, value))}."


def _remedy(verdict: Verdict, gains: Sequence[Gain], winner: Scored, latest: Scored) -> str:
    missing = [i for i, g in enumerate(gains) if g.interval is None]
    if missing:
        return _why_no_interval(gains[missing[0]].monitor, winner, latest, missing[0])
    assert verdict.num_differences is not None
    needed = [batches_needed(verdict.num_differences, g.gain, g.interval) for g in gains if g.interval is not None]
    known = [n for n in needed if n is not None]
    if not known:
        return f"Telling so small a difference from zero would take over {MOST_TIMES} times as much validation data."
    if _in_blocks(latest, 0):
        return f"About {min(known) / verdict.num_differences:.2g} times as many batches would decide at this spread."
    return f"About {min(known)} such batches would decide at this spread."


def _why_no_interval(monitor: str, winner: Scored, latest: Scored, index: int) -> str:
    if winner.confirm is None or latest.confirm is None:
        return "No validation batches are left to confirm it. Use more or smaller batches."
    ours_B, theirs_B = (c.objectives[index].values_B for c in (winner.confirm, latest.confirm))
    if ours_B is None or theirs_B is None:
        return f"There are no values by batch for an interval. Log {monitor} on every validation batch."
    if len(ours_B) != len(theirs_B):
        return f"It was measured on {len(ours_B)} and {len(theirs_B)} batches. Log {monitor} on every one."
    if len(ours_B) >= MIN_CONFIRM_BATCHES:
        return f"{monitor} of the latest weights is not finite on every batch: look at the training run first."
    if _in_blocks(latest, index):
        return (
            f"{monitor} is no mean over batches, and {len(ours_B)} blocks are too few for an interval: at least "
            f"{MIN_CONFIRM_BATCHES} are needed, each of a batch or more on every rank. Use more or smaller batches."
        )
    return (
        f"{len(ours_B)} are too few for an interval: at least {MIN_CONFIRM_BATCHES} are needed in the "
        "confirmation half, and those that ranks evaluate side by side count as one. Use more or smaller batches."
    )


def _in_blocks(latest: Scored, index: int) -> bool:
    """Whether the metric is no mean over batches, and was computed on blocks of them."""
    return latest.search.objectives[index].values_B is None


@dataclass(frozen=True)
class Progress:
    """The monitored metric over a run.

    Args:
        step: Optimizer steps taken so far.
        curves: Steps and values of weights on the way, each curve on the same batches throughout; the first curve
            that tells a slope counts.
    """

    step: int
    curves: tuple[Sequence[Point], ...] = ()

    def steps_worth(self, gain: float, sign: int) -> int | None:
        """Return how many further steps at the current slope gain as much, to two digits.

        Args:
            gain: Improvement, in the metric's unit.
            sign: 1 if lower values are better, -1 if higher ones are.

        Returns:
            ``None`` where the slope is not well known, the run no longer improves, or the steps would be more than have
            been taken: no line holds that far.
        """
        slopes = (current_slope(curve, self.step) for curve in self.curves)
        slope = next((s for s in slopes if s is not None), math.nan)
        steps = gain / (-sign * slope) if slope else math.nan
        if not 1 <= steps <= self.step:
            return None
        return int(float(f"{steps:.2g}"))


def current_slope(curve: Sequence[Point], step: int) -> float | None:
    """Return the change of a metric a step, over the last third of the first ``step`` steps.

    >>> round(current_slope([(600, 9.0), (700, 2.3), (800, 2.2), (900, 2.1)], 900), 6)
    -0.001

    Args:
        curve: Steps and values; of a step that was trained again, the last one counts.
        step: Steps so far.

    Returns:
        ``None`` for fewer than three points, or where its 95 % interval is wider than itself.
    """
    recent = sorted({s: v for s, v in curve if (1 - RECENT_SHARE) * step < s <= step}.items())
    num = len(recent)
    if num < MIN_POINTS:
        return None
    x_mean, y_mean = (math.fsum(column) / num for column in zip(*recent, strict=True))
    spread = math.fsum((x - x_mean) ** 2 for x, _ in recent)
    slope = math.fsum((x - x_mean) * (y - y_mean) for x, y in recent) / spread
    residual = math.fsum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in recent)
    standard_error = math.sqrt(residual / (num - 2) / spread)
    margin = float(stdtrit(num - 2, (1 + CONFIDENCE) / 2)) * standard_error
    return slope if margin <= MAX_MARGIN * abs(slope) else None
