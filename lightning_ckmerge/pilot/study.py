"""A pilot study: scores its plan, and lets the best of each kind be judged on data that chose nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_ckmerge.core.outcome import Score
from lightning_ckmerge.pilot.ledger import Ledger
from lightning_ckmerge.pilot.plan import MAX_CONFIRMED, Merge, StudyPlan, between, mean, single
from lightning_ckmerge.search.problem import Half

Evaluate = Callable[[Merge, Half], Score]

# A parabola's vertex nearer to the middle than this is not worth an evaluation of its own: by it the gain differs by
# 1 % of that of the middle over the ends, at most.
NEAR_MIDDLE = 0.05
# Nearer to an end the merge is as good as the checkpoint itself.
INNERMOST, OUTERMOST = 0.05, 0.95
NEWEST, BEST_CHECKPOINT, BEST_PAIR, BEST_MEAN, BEST_PLACE = (
    "newest checkpoint",
    "best checkpoint",
    "best pair",
    "best mean",
    "best place on a line",
)


def vertex(older: float, middle: float, newer: float) -> float | None:
    """Return where a parabola through the values at ``lam`` 0, 0.5 and 1 has its least one; ``None`` if it has none.

    >>> vertex(4.0, 1.0, 0.0), vertex(0.0, 1.0, 0.0)
    (1.0, None)
    """
    bend = 2 * (older - 2 * middle + newer)
    slope = 4 * middle - 3 * older - newer
    return -slope / (2 * bend) if math.isfinite(bend) and bend > 0 and math.isfinite(slope) else None


def second_lam(older: float, middle: float, newer: float) -> float | None:
    """Return where a pair is to be scored after its middle; ``None`` if the middle will do.

    >>> second_lam(3.0, 1.0, 2.0), second_lam(2.0, 1.0, 2.0), second_lam(0.0, 1.0, 2.0)
    (0.5833333333333334, None, 0.05)

    Args:
        older: Badness of the older checkpoint: the metric, or less it where higher values are better.
        middle: Of their mean.
        newer: Of the newer checkpoint.
    """
    lam = vertex(older, middle, newer)
    if lam is None:
        # A straight line, or a hump: as near as may be to the better end.
        return INNERMOST if older < newer else OUTERMOST
    lam = min(max(lam, INNERMOST), OUTERMOST)
    return None if abs(lam - 0.5) < NEAR_MIDDLE else lam


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """The best of its kind on the search half.

    Args:
        name: Its kind.
        merge: What it is.
        search: Its score on the search half.
        confirm: On the confirmation half; ``None`` where there is none.
    """

    name: str
    merge: Merge
    search: Score
    confirm: Score | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that a study has scored.

    Args:
        plan: What was to be scored.
        sign: 1 if lower values are better, -1 if higher ones are.
        search: The scores on the search half.
        finalists: The newest checkpoint, and the best of each kind.
    """

    plan: StudyPlan
    sign: int
    search: dict[Merge, Score]
    finalists: list[Finalist] = field(default_factory=list)

    @property
    def num_evaluations(self) -> int:
        """Scores on both halves."""
        return len(self.search) + sum(f.confirm is not None for f in self.finalists)

    def badness(self, merge: Merge) -> float:
        """Return a value that is better the lower it is; infinity for one that is not finite."""
        value = self.sign * self.search[merge].value
        return value if math.isfinite(value) else math.inf

    def best_of_pair(self, older: int, newer: int) -> Merge:
        """Return the better of a pair's two merges."""
        inside = [m for m in self.search if m.places == (older, newer) and m.path == "linear" and 0 < m.lam < 1]
        return min(inside, key=self.badness)

    def gain(self, merge: Merge, over: Merge) -> float | None:
        """Return how much better a merge is than another on the search half; ``None`` if one is not finite."""
        gain = self.badness(over) - self.badness(merge)
        return gain if math.isfinite(gain) else None


def run_study(
    plan: StudyPlan,
    evaluate: Evaluate,
    sign: int,
    ledger: Ledger,
    *,
    can_confirm: Callable[[], bool] = lambda: True,
    tolerance: float = 1e-5,
    on_begun: Callable[[], None] = lambda: None,
    on_scored: Callable[[int, int], None] = lambda amount, total: None,
) -> Scores:
    """Score a plan; what the ledger holds is not scored again.

    Only the newest checkpoint is: with other values of it, data or module have changed, and the study begins anew.

    Args:
        plan: What to score.
        evaluate: Scores a merge on one half of the batches.
        sign: 1 if lower values are better, -1 if higher ones are.
        ledger: Keeps the scores.
        can_confirm: Asked in the end whether the confirmation half has any batches.
        tolerance: Relative difference of one batch's value that rounding explains.
        on_begun: Called when it is known which scores of the ledger hold, before anything else is scored.
        on_scored: Told of each evaluation, and of how many there are in all.
    """
    scores = Scores(plan=plan, sign=sign, search={})
    left = plan.num_evaluations

    def score(merge: Merge, half: Half) -> Score:
        found = ledger.get(merge, half)
        if found is None:
            found = evaluate(merge, half)
            ledger.add(merge, half, found)
        on_scored(1, left)
        return found

    # The newest first: of it an evaluation has to leave no trace.
    newest = single(plan.num_checkpoints - 1)
    _begin(ledger, newest, evaluate(newest, "search"), tolerance)
    on_begun()
    for merge in dict.fromkeys([newest, *plan.known]):
        scores.search[merge] = score(merge, "search")
    for older, newer in plan.pairs:
        ends = scores.badness(single(older)), scores.badness(between(older, newer, 0.5)), scores.badness(single(newer))
        lam = second_lam(*ends)
        merge = between(older, newer, 0.5 if lam is None else lam)
        if merge in scores.search:
            left -= 1
            on_scored(0, left)
        else:
            scores.search[merge] = score(merge, "search")
    chosen = choose(scores)
    confirms = can_confirm()
    left -= MAX_CONFIRMED - len(chosen) * confirms
    on_scored(0, left)
    scores.finalists.extend(
        Finalist(
            name=name,
            merge=merge,
            search=scores.search[merge],
            confirm=score(merge, "confirm") if confirms else None,
        )
        for name, merge in chosen.items()
    )
    return scores


def _begin(ledger: Ledger, newest: Merge, now: Score, tolerance: float) -> None:
    kept = ledger.get(newest, "search")
    if kept is not None and not _is_same(kept, now, tolerance):
        ledger.clear()
        kept = None
    if kept is None:
        ledger.add(newest, "search", now)


def _is_same(kept: Score, now: Score, tolerance: float) -> bool:
    ours, theirs = ((s.value, *(s.values_B or ()), *(s.sizes_B or ())) for s in (kept, now))
    if len(ours) != len(theirs):
        return False
    return all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(ours, theirs, strict=True)
    )


def choose(scores: Scores) -> dict[str, Merge]:
    """Return the newest checkpoint and, on the search half, the best of each kind that is not the same as another.

    Of pairs, those with the newest checkpoint: another one is nothing that a run could have merged at its end.
    """
    plan = scores.plan
    last = plan.num_checkpoints - 1
    kinds = {
        NEWEST: [single(last)],
        BEST_CHECKPOINT: [single(k) for k in plan.mapped],
        BEST_PAIR: [scores.best_of_pair(older, newer) for older, newer in plan.pairs if newer == last],
        BEST_MEAN: [mean(w.places(plan.num_checkpoints)) for w in plan.windows if w.num > 2],
        BEST_PLACE: list(plan.places),
    }
    chosen: dict[str, Merge] = {}
    for name, merges in kinds.items():
        best = min(merges, key=scores.badness, default=None)
        if best is not None and best not in chosen.values():
            chosen[name] = best
    return chosen
