"""The verdict in words: from which value to which, by how much, how surely; and for the undecided, what would decide.

All its numbers stand in the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_ckmerge.core.outcome import Gain, Trial, Verdict
from lightning_ckmerge.core.wording import change_told, value_told
from lightning_ckmerge.search.interval import MIN_CONFIRM_BATCHES, MOST_TIMES, batches_needed


def verdict_told(verdict: Verdict, gains: Sequence[Gain], winner: Trial, latest: Trial, best_anchor: Trial) -> str:
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
    changes = _changes(gains, winner, latest) + _place(verdict, winner, latest)
    if verdict.status == "rejected":
        return f"Merging does not help: {name} {changes}."
    if verdict.status == "unconfirmed":
        return f"Unconfirmed: merging {changes}. {_what_would_decide(verdict, gains, winner, latest)}"
    of_front = f" The merge is {name}, of a Pareto front of {len(verdict.front)}." if verdict.others else ""
    return f"Merging {changes}.{_steps_worth(verdict)}{of_front}{_anchor(verdict, winner, best_anchor)}"


def _nothing_found(gains: Sequence[Gain], latest: Trial) -> str:
    values = [f"{g.monitor} of {value_told(o.value)}" for g, o in zip(gains, latest.search.objectives, strict=True)]
    found = "no candidate beats" if len(gains) == 1 else "no merge is a better compromise than"
    return f"Merging does not help: {found} the latest weights' {' and '.join(values)} on the search half."


def _changes(gains: Sequence[Gain], winner: Trial, latest: Trial) -> str:
    told = [_change(g, i, winner, latest) for i, g in enumerate(gains)]
    if len(told) == 1:
        change, interval = told[0]
        return f"{change}; 95 % interval {interval}" if interval else change
    parts = [f"{change} ({interval})" if interval else change for change, interval in told]
    together = ", 95 % intervals for all together" if any(interval for _, interval in told) else ""
    return " and ".join(parts) + together


def _change(gain: Gain, index: int, winner: Trial, latest: Trial) -> tuple[str, str]:
    both = winner.confirm is not None and latest.confirm is not None
    after, before = ((t.confirm if both and t.confirm else t.search).objectives[index] for t in (winner, latest))
    # A metric that is negative on some batches lies around zero: a share of it says nothing.
    by_share = min(before.values_B or (0.0,)) >= 0
    return change_told(gain.monitor, gain.mode, before.value, after.value, gain.interval, by_share=by_share)


def _place(verdict: Verdict, winner: Trial, latest: Trial) -> str:
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


def _anchor(verdict: Verdict, winner: Trial, best_anchor: Trial) -> str:
    """What one could have had without a search, where that is a merge."""
    is_news = best_anchor is not winner and best_anchor.candidate.name != "latest"
    if not is_news or best_anchor.confirm is None or verdict.others:
        return ""
    return f" The best anchor, {best_anchor.candidate.name}, comes to {value_told(best_anchor.confirm.value)}."


def _what_would_decide(verdict: Verdict, gains: Sequence[Gain], winner: Trial, latest: Trial) -> str:
    missing = [i for i, g in enumerate(gains) if g.interval is None]
    if missing:
        return _why_no_interval(gains[missing[0]].monitor, winner, latest, missing[0])
    assert verdict.num_differences is not None
    needed = [batches_needed(verdict.num_differences, g.gain, g.interval) for g in gains if g.interval is not None]
    known = [n for n in needed if n is not None]
    if not known:
        return f"So small a difference would take more than {MOST_TIMES} times as much validation data to tell."
    if _in_blocks(latest, 0):
        return f"About {min(known) / verdict.num_differences:.2g} times as many batches would decide at this spread."
    return f"About {min(known)} such batches would decide at this spread."


def _why_no_interval(monitor: str, winner: Trial, latest: Trial, index: int) -> str:
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


def _in_blocks(latest: Trial, index: int) -> bool:
    """Whether the metric is no mean over batches, and was computed on blocks of them."""
    return latest.search.objectives[index].values_B is None
